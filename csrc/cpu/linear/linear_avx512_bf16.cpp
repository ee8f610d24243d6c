// linear() with AVX512_BF16, where vdpbf16ps takes two values at once: for BF16 weights, and for weights of integers
// with BF16 x, those of eight bits being exact in bfloat16.
#include "csrc/cpu/linear/linear_avx512.h"

namespace sparse24::cpu {
namespace {

// Bf16Dot::control: the columns in the unit that both indices of a code name, for each group of the unit.
struct Bf16Tables {
  uint16_t columns[8][16][2];
  constexpr Bf16Tables() : columns() {
    for (int group = 0; group < 8; ++group) {
      for (int code = 0; code < 16; ++code) {
        columns[group][code][0] = static_cast<uint16_t>(4 * group + first_of(code));
        columns[group][code][1] = static_cast<uint16_t>(4 * group + second_of(code));
      }
    }
  }
};
alignas(64) constexpr Bf16Tables BF16_TABLES;

// acc += permute(x, control) . values, two columns a lane. Sums are rounded to nearest even and subnormals count as
// zero, as the instruction defines.
struct Bf16Products {
  static SPARSE24_INLINE void add(__m512i& acc, __m512i control, const uint8_t* x, __m512i values) {
    __m512i permuted;
    asm volatile("vpermw %[x], %[control], %[permuted]\n\tvdpbf16ps %[values], %[permuted], %[acc]"
                 : [acc] "+v"(acc), [permuted] "=&v"(permuted)
                 : [control] "v"(control), [x] "m"(*reinterpret_cast<const __m512i*>(x)), [values] "v"(values));
  }

  static SPARSE24_INLINE __m512i sum(__m512i a, __m512i b) {
    return _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)));
  }
};

struct Bf16Dot : Bf16Products {
  static constexpr Element WEIGHT = Element::BF16, PANEL = Element::BF16;
  static constexpr int STEPS = 8, UNIT_STEPS = 8, PARTS = 1;

  template <bool ROOM>
  static SPARSE24_INLINE __m512i control(const uint8_t* all, int step) {
    // vpermd reads the low four bits of each lane: one code.
    const __m512i codes = _mm512_srli_epi32(_mm512_loadu_si512(all), 4 * step);
    return _mm512_permutexvar_epi32(codes, constant<ROOM>(BF16_TABLES.columns[step]));
  }

  template <bool ROOM>
  static SPARSE24_INLINE __m512i values(const uint8_t* all, int step) {
    return _mm512_loadu_si512(all + 64 * step);
  }
};

// A chunk of 64 columns has 16 pairs of slots, 8 for each unit of 32 columns. In 2:4 a unit has its own vector of
// codes; in pair 4:8 half of each lane, and codes beyond it are not looked at.

struct I8Bf16Dot : Bf16Products {
  static constexpr Element WEIGHT = Element::I8, PANEL = Element::BF16;
  static constexpr int STEPS = 8, UNIT_STEPS = 8, PARTS = 2, PART_CODES = CODES_BYTES;

  template <bool ROOM>
  static SPARSE24_INLINE __m512i control(const uint8_t* all, int step) {
    return Bf16Dot::control<ROOM>(all, step);
  }

  template <bool ROOM>
  static SPARSE24_INLINE __m512i values(const uint8_t* all, int step) {
    return bf16_of_bytes<ROOM>(_mm512_loadu_si512(all + step / 2 * 64), step % 2 * 2);
  }
};

// I4Bf16Dot: the bfloat16 of a nibble, and the columns of two values that a code names. vpermw reads the low five bits
// of a half: a nibble, and whatever bit is above it.
struct I4Tables {
  uint16_t number[32];
  uint16_t columns[8][16][2];  // by group of the unit (four of them) and first or second of each pair, then code
  constexpr I4Tables() : number(), columns() {
    for (int i = 0; i < 16; ++i) {
      const auto bits = __builtin_bit_cast(uint32_t, static_cast<float>(i < 8 ? i : i - 16));
      number[i] = number[i + 16] = static_cast<uint16_t>(bits >> 16);
      for (int j = 0; j < 8; ++j) {
        columns[j][i][0] = static_cast<uint16_t>(8 * (j / 2) + 2 * first_of(i) + j % 2);
        columns[j][i][1] = static_cast<uint16_t>(8 * (j / 2) + 2 * second_of(i) + j % 2);
      }
    }
  }
};
alignas(64) constexpr I4Tables I4_TABLES;

// The two values of a step are the first of both pairs of a group, or the second of both: those lie in both halves of a
// lane, where one permute finds them.
struct I4Bf16Dot : Bf16Products {
  static constexpr Element WEIGHT = Element::I4, PANEL = Element::BF16;
  static constexpr int STEPS = 8, UNIT_STEPS = 8, PARTS = 2, PART_CODES = 2;

  template <bool ROOM>
  static SPARSE24_INLINE __m512i control(const uint8_t* all, int step) {
    const __m512i codes = _mm512_srli_epi32(_mm512_loadu_si512(all), step / 2 * 4);
    return _mm512_permutexvar_epi32(codes, constant<ROOM>(I4_TABLES.columns[step]));
  }

  template <bool ROOM>
  static SPARSE24_INLINE __m512i values(const uint8_t* all, int step) {
    const __m512i eight = _mm512_loadu_si512(all + step / 4 * 64);
    const __m512i nibbles = _mm512_srli_epi16(eight, step % 2 * 8 + step / 2 % 2 * 4);
    return _mm512_permutexvar_epi16(nibbles, constant<ROOM>(I4_TABLES.number));
  }
};

// I4TwoFourBf16Dot: a quad is two groups, which lie in both halves of a lane. The two values of a step are the first of
// each group, or the second of each.
struct QuadTables {
  uint8_t bits[8][64];  // by place of the quad's codes in a lane, first or second: where in 64 bits the indices begin
  uint32_t index[16], group[4][16];
  constexpr QuadTables() : bits(), index(), group() {
    for (int i = 0; i < 64; ++i) {
      for (int j = 0; j < 8; ++j) {
        bits[j][i] = static_cast<uint8_t>(i / 4 % 2 * 32 + j / 2 * 8 + i % 4 / 2 * 4 + j % 2 * 2);
      }
    }
    for (int i = 0; i < 16; ++i) {
      index[i] = 0x00030003;
      for (int j = 0; j < 4; ++j) group[j][i] = static_cast<uint32_t>(8 * j + 4) << 16 | static_cast<uint32_t>(8 * j);
    }
  }
};
alignas(64) constexpr QuadTables QUAD_TABLES;

struct I4TwoFourBf16Dot : Bf16Products {
  static constexpr Element WEIGHT = Element::I4_TWO_FOUR, PANEL = Element::BF16;
  static constexpr int STEPS = 8, UNIT_STEPS = 8, PARTS = 2, PART_CODES = CODES_BYTES;

  template <bool ROOM>
  static SPARSE24_INLINE __m512i control(const uint8_t* all, int step) {
    const int quad = step / 2;
    const __m512i codes = _mm512_multishift_epi64_epi8(constant<ROOM>(QUAD_TABLES.bits[step]), _mm512_loadu_si512(all));
    return _mm512_ternarylogic_epi32(codes, constant<ROOM>(QUAD_TABLES.index), constant<ROOM>(QUAD_TABLES.group[quad]),
                                     0xEA);  // (codes & index) | group
  }

  template <bool ROOM>
  static SPARSE24_INLINE __m512i values(const uint8_t* all, int step) {
    return I4Bf16Dot::values<ROOM>(all, step);
  }
};

void pack_bf16(const Strip& strip) {
  for (int row = 0; row < strip.count; ++row) {
    const void* const x = strip.rows[row];
    uint8_t* unit = strip.panel + (strip.row + row) * UNIT_BYTES;
    for (int64_t k = 0; k < strip.columns; k += 32, unit += strip.panel_rows * UNIT_BYTES) {
      const int64_t left = strip.in_features - k;
      if (strip.x_element == Element::BF16) {
        const __mmask32 mask = left >= 32 ? ~__mmask32{0} : left <= 0 ? 0 : (__mmask32{1} << left) - 1;
        _mm512_store_si512(unit, _mm512_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(x) + k));
      } else {
        const __m512 low = load_floats(x, strip.x_element, k, first_lanes(left));
        const __m512 high = load_floats(x, strip.x_element, k + 16, first_lanes(left - 16));
        _mm512_store_si512(unit, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
      }
    }
  }
}

constexpr Kernels BF16_KERNELS = kernels_of<Bf16Dot>(pack_bf16);
constexpr Kernels I8_KERNELS = kernels_of<I8Bf16Dot>(pack_bf16);
constexpr Kernels I4_KERNELS = kernels_of<I4Bf16Dot>(pack_bf16);
constexpr Kernels I4_TWO_FOUR_KERNELS = kernels_of<I4TwoFourBf16Dot>(pack_bf16);

}  // namespace

const Kernels* avx512_bf16_kernels(Element weight, bool weight_only, Element x_element) {
  if (weight == Element::BF16) return &BF16_KERNELS;
  if (!weight_only || x_element != Element::BF16) return nullptr;
  return weight == Element::I8 ? &I8_KERNELS : weight == Element::I4 ? &I4_KERNELS : &I4_TWO_FOUR_KERNELS;
}

}  // namespace sparse24::cpu
