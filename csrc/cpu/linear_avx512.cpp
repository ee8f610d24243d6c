// linear() in AVX-512 without BF16: float products for F32, F16 and BF16 weights, vpdpbusd for I8.
#include "csrc/cpu/linear_avx512.h"

namespace sparse24::cpu {
namespace {

// ---- Dot products ----

// FloatDot::control: an index has two bits, and each of the four groups of a unit starts at its column.
struct FloatTables {
  uint32_t index[16], group[4][16];
  constexpr FloatTables() : index(), group() {
    for (int i = 0; i < 16; ++i) {
      index[i] = 3;
      for (int j = 0; j < 4; ++j) group[j][i] = 4 * j;
    }
  }
};
alignas(64) constexpr FloatTables FLOAT_TABLES;

// acc += permute(x, control) * values, one column a lane. Sixteen slots meet two units of 16 columns.
template <Element ELEMENT>
struct FloatDot {
  static constexpr Element WEIGHT = ELEMENT;
  static constexpr int STEPS = 16, UNIT_STEPS = 8;

  template <bool ROOM>
  static SPARSE24_INLINE __m512i control(const uint8_t* chunk, int step) {
    const __m512i codes = _mm512_srli_epi32(_mm512_loadu_si512(chunk), 2 * step);
    const __m512i group = constant<ROOM>(FLOAT_TABLES.group[step / 2 % 4]);
    return _mm512_ternarylogic_epi32(codes, constant<ROOM>(FLOAT_TABLES.index), group,
                                     0xEA);  // (codes & index) | group
  }

  static SPARSE24_INLINE __m512i values(const uint8_t* chunk, int step) {
    const uint8_t* all = chunk + CODES_BYTES;
    if constexpr (ELEMENT == Element::F32) return _mm512_loadu_si512(all + 64 * step);
    if constexpr (ELEMENT == Element::F16) {
      return _mm512_castps_si512(
          _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(all + 32 * step))));
    }
    const __m512i both = _mm512_loadu_si512(all + step / 2 * 64);  // slots step & ~1 (low) and step | 1 (high)
    return step % 2 == 0 ? _mm512_slli_epi32(both, 16)
                         : _mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
  }

  // In assembly, because from intrinsics g++ 12 spills accumulators at 24 rows and more, which costs a quarter.
  static SPARSE24_INLINE void add(__m512i& acc, __m512i control, const uint8_t* x, __m512i values) {
    __m512i permuted;
    asm volatile("vpermps %[x], %[control], %[permuted]\n\tvfmadd231ps %[values], %[permuted], %[acc]"
                 : [acc] "+v"(acc), [permuted] "=&v"(permuted)
                 : [control] "v"(control), [x] "m"(*reinterpret_cast<const __m512i*>(x)), [values] "v"(values));
  }

  static SPARSE24_INLINE __m512i sum(__m512i a, __m512i b) {
    return _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)));
  }
};

// The tables of I8Dot::control. A row's byte of codes holds the four indices of two groups: byte i of a lane takes bits
// 2 i of it (BITS counts from the start of 64 bits, which two rows share), and its group starts at GROUP.
struct I8Tables {
  uint8_t bits[4][64], group[8][64];
  constexpr I8Tables() : bits(), group() {
    for (int i = 0; i < 64; ++i) {
      for (int step = 0; step < 4; ++step) bits[step][i] = static_cast<uint8_t>(i / 4 % 2 * 32 + 8 * step + i % 4 * 2);
      for (int step = 0; step < 8; ++step) group[step][i] = static_cast<uint8_t>(8 * step + i % 4 / 2 * 4);
    }
  }
};
alignas(64) constexpr I8Tables I8_TABLES;

// acc += permute(x, control) . values, four columns of two groups a lane, x unsigned.
struct I8Dot {
  static constexpr Element WEIGHT = Element::I8;
  static constexpr int STEPS = 8, UNIT_STEPS = 8;

  template <bool ROOM>
  static SPARSE24_INLINE __m512i control(const uint8_t* chunk, int step) {
    const __m512i codes = _mm512_multishift_epi64_epi8(constant<ROOM>(I8_TABLES.bits[step % 4]),
                                                       _mm512_loadu_si512(chunk + step / 4 * CODES_BYTES));
    const __m512i group = constant<ROOM>(I8_TABLES.group[step]);
    return _mm512_ternarylogic_epi32(codes, _mm512_set1_epi8(3), group, 0xEA);  // (codes & 3) | group
  }

  static SPARSE24_INLINE __m512i values(const uint8_t* chunk, int step) {
    return _mm512_loadu_si512(chunk + chunk_codes_bytes(Element::I8) + 64 * step);
  }

  static SPARSE24_INLINE void add(__m512i& acc, __m512i control, const uint8_t* x, __m512i values) {
    __m512i permuted;
    asm volatile("vpermb %[x], %[control], %[permuted]\n\tvpdpbusd %[values], %[permuted], %[acc]"
                 : [acc] "+v"(acc), [permuted] "=&v"(permuted)
                 : [control] "v"(control), [x] "m"(*reinterpret_cast<const __m512i*>(x)), [values] "v"(values));
  }

  static SPARSE24_INLINE __m512i sum(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }
};

// ---- Rows of x ----

// As floats; for BF16 weights rounded to bfloat16, as every instruction set does.
template <bool ROUND_TO_BF16>
void pack_float_row(const Linear& call, int64_t token, uint8_t* unit, int64_t unit_stride, float*) {
  const void* row = row_of_x(call, token);
  const Element element = call.x_element;
  const int64_t columns = chunk_count(Element::F32, call.in_features) * chunk_columns(Element::F32);
  for_each_16(call.in_features, columns, [&](int64_t k, __mmask16 mask) SPARSE24_LAMBDA {
    __m512 v = load_floats(row, element, k, mask);
    if (ROUND_TO_BF16) v = _mm512_castsi512_ps(round_to_bf16(v));
    _mm512_store_ps(unit, v);
    unit += unit_stride;
  });
}

// s = amax / 127, q = clamp(round-to-nearest-even(x / s), -127, 127), stored as q + 128. A row with an Inf or a NaN
// gets the scale NaN, whatever its q; one whose amax / 127 is 0 gets the scale 1.
void pack_i8_row(const Linear& call, int64_t token, uint8_t* unit, int64_t unit_stride, float* scale) {
  const void* row = row_of_x(call, token);
  const Element element = call.x_element;
  const int64_t in_features = call.in_features;

  // As integers the bits of |x| are in the order of the floats, with Inf above the finite and NaN above Inf.
  __m512i largest = _mm512_setzero_si512();
  for_each_16(in_features, in_features, [&](int64_t k, __mmask16 mask) SPARSE24_LAMBDA {
    const __m512 magnitudes = _mm512_abs_ps(load_floats(row, element, k, mask));
    largest = _mm512_max_epi32(largest, _mm512_castps_si512(magnitudes));
  });
  const int amax_bits = _mm512_reduce_max_epi32(largest);
  float amax;
  __builtin_memcpy(&amax, &amax_bits, sizeof amax);
  float s = amax / 127;
  if (s == 0) s = 1;
  if (amax_bits >= 0x7f800000) s = __builtin_nanf("");
  *scale = s;

  // A division: on Zen 4 the exact quotient by Newton steps takes as long, and x * (1 / s) is wrong at ties.
  const __m512 divisor = _mm512_set1_ps(s);
  const __m128i offset = _mm_set1_epi8(static_cast<char>(0x80));
  const int64_t columns = chunk_count(Element::I8, in_features) * chunk_columns(Element::I8);
  for_each_16(in_features, columns, [&](int64_t k, __mmask16 mask) SPARSE24_LAMBDA {
    const __m512 quotient = _mm512_div_ps(load_floats(row, element, k, mask), divisor);
    const __m512i q = _mm512_cvt_roundps_epi32(quotient, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m128i clamped = _mm512_cvtsepi32_epi8(_mm512_max_epi32(q, _mm512_set1_epi32(-127)));  // saturates at 127
    _mm_store_si128(reinterpret_cast<__m128i*>(unit + k / 64 * unit_stride + k % 64), _mm_xor_si128(clamped, offset));
  });
}

constexpr Kernels F32_KERNELS{Element::F32, pack_float_row<false>, multiply<FloatDot<Element::F32>>};
constexpr Kernels F16_KERNELS{Element::F32, pack_float_row<false>, multiply<FloatDot<Element::F16>>};
constexpr Kernels BF16_KERNELS{Element::F32, pack_float_row<true>, multiply<FloatDot<Element::BF16>>};
constexpr Kernels I8_KERNELS{Element::I8, pack_i8_row, multiply<I8Dot>};

}  // namespace

const Kernels& avx512_kernels(Element weight_element) {
  switch (weight_element) {
    case Element::F16:
      return F16_KERNELS;
    case Element::BF16:
      return BF16_KERNELS;
    case Element::I8:
      return I8_KERNELS;
    default:
      return F32_KERNELS;
  }
}

}  // namespace sparse24::cpu
