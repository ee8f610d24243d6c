// Sixteen floats at a time in AVX-512: loads and stores of every element type, and the activations. Only for files
// built with AVX-512: everything is in an anonymous namespace, so that none of it is linked into the portable path.
#pragma once
// g++ 12 takes the undefined operand inside its own unmasked intrinsics for a bug (gcc.gnu.org/PR105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "csrc/cpu/linear/activations.h"
#include "csrc/cpu/linear/linear.h"

namespace sparse24::cpu {
namespace {

#define SPARSE24_LAMBDA __attribute__((always_inline))

// The first `count` of 16 lanes; all from 16 on, none at 0 and below.
SPARSE24_INLINE __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

// Calls body(k, mask) for k = 0, 16, 32, ... below `end`, mask being the lanes below `count`. The full ones come first,
// with a mask that the compiler knows.
template <class Body>
SPARSE24_INLINE void for_each_16(int64_t count, int64_t end, const Body& body) {
  int64_t k = 0;
  for (; k + 16 <= count; k += 16) body(k, __mmask16{0xffff});
  for (; k < end; k += 16) body(k, first_lanes(count - k));
}

// ---- Elements ----

// Elements [index, index + 16) of `array` as floats; lanes out of `mask` are not read and become 0.
SPARSE24_INLINE __m512 load_floats(const void* array, Element element, int64_t index, __mmask16 mask) {
  if (element == Element::F32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(array) + index);
  const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(array) + index);
  if (element == Element::F16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// The bfloat16 nearest to each lane, ties to even, in the high half of its 32 bits. Like vcvtneps2bf16, but subnormals
// are kept, and it needs no AVX512_BF16.
SPARSE24_INLINE __m512i round_to_bf16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v), high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x00400000));  // a NaN must not round to Inf
  return _mm512_and_si512(_mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet), high);
}

// The same as 16 bits.
SPARSE24_INLINE __m256i bf16_of(__m512 v) {
#if defined(__AVX512BF16__)
  constexpr int SUBNORMAL = 0x20;
  if (_mm512_fpclass_ps_mask(v, SUBNORMAL) == 0) [[likely]]
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
#endif
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_to_bf16(v), 16));
}

SPARSE24_INLINE void store_floats(void* array, Element element, int64_t index, __mmask16 mask, __m512 v) {
  if (element == Element::F32) return _mm512_mask_storeu_ps(static_cast<float*>(array) + index, mask, v);
  const __m256i half =
      element == Element::F16 ? _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC) : bf16_of(v);
  _mm256_mask_storeu_epi16(static_cast<uint16_t*>(array) + index, mask, half);
}

// clamp(round-to-nearest-even(v / scale), -127, 127), a NaN as 0.
SPARSE24_INLINE void store_quantized(int8_t* y, __mmask16 mask, __m512 v, __m512 scale) {
  const __m512 quotient = _mm512_div_ps(v, scale);
  // Clamped as floats: the conversion would make the smallest integer of what is too large, and of NaN.
  const __m512 low = _mm512_max_ps(quotient, _mm512_set1_ps(-127));
  const __m512i q =
      _mm512_cvt_roundps_epi32(_mm512_min_ps(low, _mm512_set1_ps(127)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512i number = _mm512_maskz_mov_epi32(_mm512_cmp_ps_mask(quotient, quotient, _CMP_ORD_Q), q);
  _mm_mask_storeu_epi8(y, mask, _mm512_cvtepi32_epi8(number));
}

// ---- Transposition ----

// Lane j of rows[i] and lane i of rows[j] change places.
SPARSE24_INLINE void transpose_16(__m512i (&rows)[16]) {
  __m512i a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 4) {  // b[i + j]: column j of each 4 x 4 of the rows i to i + 3
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i even_low = _mm512_shuffle_i32x4(b[j], b[j + 4], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(b[j], b[j + 4], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(b[j + 8], b[j + 12], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(b[j + 8], b[j + 12], 0xdd);
    rows[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    rows[j + 4] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    rows[j + 8] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    rows[j + 12] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
}

// ---- Activations ----

template <int COUNT>
SPARSE24_INLINE __m512 polynomial(__m512 t, const float (&coefficients)[COUNT]) {  // the constant term first
  __m512 sum = _mm512_set1_ps(coefficients[COUNT - 1]);
#pragma GCC unroll 16
  for (int i = COUNT - 2; i >= 0; --i) sum = _mm512_fmadd_ps(sum, t, _mm512_set1_ps(coefficients[i]));
  return sum;
}

// exp(z + small) for z <= 0 and |small| <= 2^-17, within 1 ulp and a subnormal where exp is one. For NaN it is
// exp(-110), which is 0: callers multiply by the NaN.
SPARSE24_INLINE __m512 exp_negative(__m512 z, __m512 small) {
  z = _mm512_max_ps(z, _mm512_set1_ps(-110));
  const __m512 n =
      _mm512_roundscale_ps(_mm512_mul_ps(z, _mm512_set1_ps(LOG2_E)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(LN2_HIGH), z);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(LN2_LOW), r);
  r = _mm512_add_ps(r, small);
  return _mm512_scalef_ps(polynomial(r, EXP), n);
}

// x times the logistic function of z: for z >= 0, x / (1 + exp(-z)); below, x exp(z) / (1 + exp(z)).
SPARSE24_INLINE __m512 times_logistic(__m512 x, __m512 z) {
  const __m512 one = _mm512_set1_ps(1), zero = _mm512_setzero_ps();
  const __m512 e = exp_negative(_mm512_sub_ps(zero, _mm512_abs_ps(z)), zero);
  const __m512 numerator = _mm512_mask_mov_ps(one, _mm512_cmp_ps_mask(z, zero, _CMP_LT_OQ), e);
  return _mm512_mul_ps(x, _mm512_div_ps(numerator, _mm512_add_ps(one, e)));
}

// x Phi(x), Phi the normal distribution: by its tail rather than by 1 + erf, which would cancel for x < 0.
SPARSE24_INLINE __m512 gelu(__m512 x) {
  const __m512 a = _mm512_min_ps(_mm512_abs_ps(x), _mm512_set1_ps(15));  // NaN gives 15; the last product gives NaN
  const __m512 square = _mm512_mul_ps(a, a);
  const __m512 square_error = _mm512_fmsub_ps(a, a, square);
  const __m512 minus_half = _mm512_set1_ps(-0.5f);
  const __m512 e = exp_negative(_mm512_mul_ps(minus_half, square), _mm512_mul_ps(minus_half, square_error));
  const __m512 tail = _mm512_mul_ps(e, _mm512_div_ps(polynomial(a, PHI_P), polynomial(a, PHI_Q)));
  const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  return _mm512_mul_ps(x, _mm512_mask_sub_ps(tail, static_cast<__mmask16>(~negative), _mm512_set1_ps(1), tail));
}

// x / 2 (1 + tanh u) = x logistic(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
SPARSE24_INLINE __m512 gelu_tanh(__m512 x) {
  const __m512 slope = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(GELU_TANH_3), _mm512_set1_ps(GELU_TANH_1));
  return times_logistic(x, _mm512_mul_ps(x, slope));
}

template <Activation ACTIVATION>
SPARSE24_INLINE __m512 activate(__m512 x) {
  switch (ACTIVATION) {
    case Activation::RELU:
      return _mm512_max_ps(_mm512_setzero_ps(), x);  // the second operand where either is NaN
    case Activation::GELU:
      return gelu(x);
    case Activation::GELU_TANH:
      return gelu_tanh(x);
    case Activation::SILU:
      return times_logistic(x, x);
    default:
      return x;
  }
}

}  // namespace
}  // namespace sparse24::cpu
