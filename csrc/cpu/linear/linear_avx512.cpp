// linear() in AVX-512 without BF16: float products for F32, F16 and BF16 weights, vpdpbusd for I8 and I4. Weights of
// integers with float x are in linear_weight_only_avx512.cpp.
#include "csrc/cpu/linear/linear_avx512.h"

#include "csrc/cpu/quantize.h"

namespace sparse24::cpu {
namespace {

// ---- Dot products ----

// FloatDot::control: an index has two bits, and each of the four groups of a unit starts at its column.
struct FloatTables {
  uint32_t index[16], group[4][16], high_half[16];
  constexpr FloatTables() : index(), group(), high_half() {
    for (int i = 0; i < 16; ++i) {
      index[i] = 3;
      high_half[i] = 0xffff0000;
      for (int j = 0; j < 4; ++j) group[j][i] = 4 * j;
    }
  }
};
alignas(64) constexpr FloatTables FLOAT_TABLES;

// acc += permute(x, control) * values, one column a lane. Sixteen slots meet two units of 16 columns.
template <Element ELEMENT>
struct FloatDot : FloatProducts {
  static constexpr Element WEIGHT = ELEMENT, PANEL = Element::F32;
  static constexpr int STEPS = 16, UNIT_STEPS = 8, PARTS = 1;

  template <bool ROOM>
  static SPARSE24_INLINE __m512i control(const uint8_t* all, int step) {
    const __m512i codes = _mm512_srli_epi32(_mm512_loadu_si512(all), 2 * step);
    const __m512i group = constant<ROOM>(FLOAT_TABLES.group[step / 2 % 4]);
    return _mm512_ternarylogic_epi32(codes, constant<ROOM>(FLOAT_TABLES.index), group,
                                     0xEA);  // (codes & index) | group
  }

  template <bool ROOM>
  static SPARSE24_INLINE __m512i values(const uint8_t* all, int step) {
    if constexpr (ELEMENT == Element::F32) return _mm512_loadu_si512(all + 64 * step);
    if constexpr (ELEMENT == Element::F16) {
      return _mm512_castps_si512(
          _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(all + 32 * step))));
    }
    const __m512i both = _mm512_loadu_si512(all + step / 2 * 64);  // slots step & ~1 (low) and step | 1 (high)
    return step % 2 == 0 ? _mm512_slli_epi32(both, 16) : _mm512_and_si512(both, constant<ROOM>(FLOAT_TABLES.high_half));
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
  static constexpr Element WEIGHT = Element::I8, PANEL = Element::I8;
  static constexpr int STEPS = 8, UNIT_STEPS = 8, PARTS = 1;

  template <bool ROOM>
  static SPARSE24_INLINE __m512i control(const uint8_t* all, int step) {
    const __m512i codes = _mm512_multishift_epi64_epi8(constant<ROOM>(I8_TABLES.bits[step % 4]),
                                                       _mm512_loadu_si512(all + step / 4 * CODES_BYTES));
    const __m512i group = constant<ROOM>(I8_TABLES.group[step]);
    return _mm512_ternarylogic_epi32(codes, _mm512_set1_epi8(3), group, 0xEA);  // (codes & 3) | group
  }

  template <bool ROOM>
  static SPARSE24_INLINE __m512i values(const uint8_t* all, int step) {
    return _mm512_loadu_si512(all + 64 * step);
  }

  static SPARSE24_INLINE void add(__m512i& acc, __m512i control, const uint8_t* x, __m512i values) {
    __m512i permuted;
    asm volatile("vpermb %[x], %[control], %[permuted]\n\tvpdpbusd %[values], %[permuted], %[acc]"
                 : [acc] "+v"(acc), [permuted] "=&v"(permuted)
                 : [control] "v"(control), [x] "m"(*reinterpret_cast<const __m512i*>(x)), [values] "v"(values));
  }

  static SPARSE24_INLINE __m512i sum(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }
};

// I4Dot::control: the bytes of a unit that the four values of a group of eight columns meet, by its code. Pairs of
// columns stay together, so that they are found as 16 bits.
struct I4Tables {
  uint16_t pairs[8][16][2];
  constexpr I4Tables() : pairs() {
    for (int group = 0; group < 8; ++group) {
      for (int code = 0; code < 16; ++code) {
        pairs[group][code][0] = static_cast<uint16_t>(4 * group + first_of(code));
        pairs[group][code][1] = static_cast<uint16_t>(4 * group + second_of(code));
      }
    }
  }
};
alignas(64) constexpr I4Tables I4_TABLES;

// acc += permute(x, control) . 16 values, the four columns of a group a lane, x unsigned.
struct I4Dot {
  static constexpr Element WEIGHT = Element::I4, PANEL = Element::I8;
  static constexpr int STEPS = 8, UNIT_STEPS = 8, PARTS = 1;

  template <bool ROOM>
  static SPARSE24_INLINE __m512i control(const uint8_t* all, int step) {
    // vpermd reads the low four bits of each lane: one code.
    const __m512i codes = _mm512_srli_epi32(_mm512_loadu_si512(all), 4 * step);
    return _mm512_permutexvar_epi32(codes, constant<ROOM>(I4_TABLES.pairs[step]));
  }

  template <bool ROOM>
  static SPARSE24_INLINE __m512i values(const uint8_t* all, int step) {
    const __m512i both = _mm512_loadu_si512(all + step / 2 * 64);  // groups step & ~1 and step | 1
    const __m512i high = step % 2 == 0 ? _mm512_slli_epi32(both, 4) : both;
    return _mm512_and_si512(high, _mm512_set1_epi8(static_cast<char>(0xf0)));
  }

  static SPARSE24_INLINE void add(__m512i& acc, __m512i control, const uint8_t* x, __m512i values) {
    __m512i permuted;
    asm volatile("vpermw %[x], %[control], %[permuted]\n\tvpdpbusd %[values], %[permuted], %[acc]"
                 : [acc] "+v"(acc), [permuted] "=&v"(permuted)
                 : [control] "v"(control), [x] "m"(*reinterpret_cast<const __m512i*>(x)), [values] "v"(values));
  }

  static SPARSE24_INLINE __m512i sum(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }
};

// ---- Rows of x ----

// As integers the bits of |x| are in the order of the floats, with Inf above the finite and NaN above Inf.
uint32_t largest(const void* x, Element element, int64_t count) {
  __m512i bits = _mm512_setzero_si512();
  for_each_16(count, count, [&](int64_t k, __mmask16 mask) SPARSE24_LAMBDA {
    bits = _mm512_max_epi32(bits, _mm512_castps_si512(_mm512_abs_ps(load_floats(x, element, k, mask))));
  });
  return static_cast<uint32_t>(_mm512_reduce_max_epi32(bits));
}

// clamp(round-to-nearest-even(x / s), -127, 127) as bytes. A division: on Zen 4 the exact quotient by Newton steps
// takes as long, and x * (1 / s) is wrong at ties.
SPARSE24_INLINE __m128i quantized(__m512 x, __m512 s) {
  const __m512i q = _mm512_cvt_roundps_epi32(_mm512_div_ps(x, s), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_cvtsepi32_epi8(_mm512_max_epi32(q, _mm512_set1_epi32(-127)));  // saturates at 127
}

void quantize(const void* x, Element element, int64_t count, float scale, int8_t* q) {
  const __m512 s = _mm512_set1_ps(scale);
  for_each_16(count, count, [&](int64_t k, __mmask16 mask) SPARSE24_LAMBDA {
    store_quantized(q + k, mask, load_floats(x, element, k, mask), s);
  });
}

// q + 128 and each row's own scale: NaN, whatever its q, where the row has an Inf or a NaN.
void quantize_rows(const Strip& strip) {
  const Element element = strip.x_element;
  const __m128i offset = _mm_set1_epi8(static_cast<char>(0x80));
  const int64_t unit_stride = strip.panel_rows * UNIT_BYTES;
  for (int row = 0; row < strip.count; ++row) {
    const void* const x = strip.rows[row];
    const float scale = scale_of(largest(x, element, strip.in_features));
    strip.scales[row] = scale;
    const __m512 s = _mm512_set1_ps(scale);
    uint8_t* const units = strip.panel + (strip.row + row) * UNIT_BYTES;
    for_each_16(strip.in_features, strip.columns, [&](int64_t k, __mmask16 mask) SPARSE24_LAMBDA {
      const __m128i q = quantized(load_floats(x, element, k, mask), s);
      _mm_store_si128(reinterpret_cast<__m128i*>(units + k / 64 * unit_stride + k % 64), _mm_xor_si128(q, offset));
    });
  }
}

// int8 as it is, stored as q + 128.
void pack_int8(const Strip& strip) {
  const __m512i offset = _mm512_set1_epi8(static_cast<char>(0x80));
  for (int row = 0; row < strip.count; ++row) {
    const auto x = static_cast<const uint8_t*>(strip.rows[row]);
    uint8_t* unit = strip.panel + (strip.row + row) * UNIT_BYTES;
    for (int64_t k = 0; k < strip.columns; k += 64, unit += strip.panel_rows * UNIT_BYTES) {
      const int64_t left = strip.in_features - k;
      const __mmask64 mask = left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
      _mm512_store_si512(unit, _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, x + k), offset));
    }
  }
}

constexpr Kernels F32_KERNELS = kernels_of<FloatDot<Element::F32>>(pack_floats<false>);
constexpr Kernels F16_KERNELS = kernels_of<FloatDot<Element::F16>>(pack_floats<false>);
constexpr Kernels BF16_KERNELS = kernels_of<FloatDot<Element::BF16>>(pack_floats<true>);
constexpr Kernels I8_KERNELS = kernels_of<I8Dot>(quantize_rows);
constexpr Kernels I8_X_KERNELS = kernels_of<I8Dot>(pack_int8);

constexpr Kernels I4_KERNELS = kernels_of<I4Dot>(quantize_rows);
constexpr Kernels I4_X_KERNELS = kernels_of<I4Dot>(pack_int8);

constexpr Quantizer QUANTIZER{largest, quantize};

}  // namespace

const Quantizer& avx512_quantizer() { return QUANTIZER; }

const Kernels* avx512_kernels(Element weight, bool weight_only, Element x_element) {
  const bool int8_x = x_element == Element::I8;
  if (weight_only) return avx512_weight_only_kernels(weight);
  switch (weight) {
    case Element::F16:
      return &F16_KERNELS;
    case Element::BF16:
      return &BF16_KERNELS;
    case Element::I8:
      return int8_x ? &I8_X_KERNELS : &I8_KERNELS;
    case Element::I4:
      return int8_x ? &I4_X_KERNELS : &I4_KERNELS;
    default:
      return &F32_KERNELS;
  }
}

}  // namespace sparse24::cpu
