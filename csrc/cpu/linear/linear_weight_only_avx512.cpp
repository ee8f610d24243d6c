// linear() in AVX-512 for weights of integers with float x: values become floats in registers, for all rows of a panel.
#include "csrc/cpu/linear/linear_avx512.h"

namespace sparse24::cpu {
namespace {

// The columns of a unit of 16 that stay, for each way the groups of 2:4 (four of them) or pair 4:8 (two) lie in it.
struct Tables {
  uint32_t index[16], group[4][16];  // 2:4: an index has two bits, and each group starts at its column
  uint32_t slot[2][4][16];           // pair 4:8: by group of the unit, value of the group, and code
  constexpr Tables() : index(), group(), slot() {
    for (int i = 0; i < 16; ++i) {
      index[i] = 3;
      for (int j = 0; j < 4; ++j) group[j][i] = 4 * j;
      for (int j = 0; j < 8; ++j) {
        slot[j / 4][j % 4][i] = 8 * (j / 4) + 2 * (j % 4 < 2 ? first_of(i) : second_of(i)) + j % 2;
      }
    }
  }
};
alignas(64) constexpr Tables TABLES;

// A chunk of 64 columns has 32 slots, 8 for each unit of 16 columns. In 2:4 half of them has its own vector of codes;
// in pair 4:8 half of each lane, and codes beyond it are not looked at.

// The int4 values of slot `step` of those from `all` on, as floats.
template <bool ROOM>
SPARSE24_INLINE __m512i nibble(const uint8_t* all, int step) {
  const __m512i eight = _mm512_loadu_si512(all + step / 8 * 64);  // of two quads
  const int at = step % 4 * 8 + step / 4 % 2 * 4;                 // of the nibble in its lane
  const __m512i low = at <= 16 ? eight : _mm512_srli_epi32(eight, 16);
  switch (at <= 16 ? at : at - 16) {
    case 0:
      return _mm512_castps_si512(float_of<ROOM, 4, 0>(low));
    case 4:
      return _mm512_castps_si512(float_of<ROOM, 4, 4>(low));
    case 8:
      return _mm512_castps_si512(float_of<ROOM, 4, 8>(low));
    case 12:
      return _mm512_castps_si512(float_of<ROOM, 4, 12>(low));
    default:
      return _mm512_castps_si512(float_of<ROOM, 4, 16>(low));
  }
}

template <Element ELEMENT>
struct TwoFourDot : FloatProducts {
  static constexpr Element WEIGHT = ELEMENT, PANEL = Element::F32;
  static constexpr int STEPS = 16, UNIT_STEPS = 8, PARTS = 2, PART_CODES = CODES_BYTES;

  template <bool ROOM>
  static SPARSE24_INLINE __m512i control(const uint8_t* all, int step) {
    const __m512i codes = _mm512_srli_epi32(_mm512_loadu_si512(all), step * 2);
    return _mm512_ternarylogic_epi32(codes, constant<ROOM>(TABLES.index), constant<ROOM>(TABLES.group[step / 2 % 4]),
                                     0xEA);  // (codes & index) | group
  }

  template <bool ROOM>
  static SPARSE24_INLINE __m512i values(const uint8_t* all, int step) {
    if constexpr (is_int4(WEIGHT)) return nibble<ROOM>(all, step);
    return _mm512_castps_si512(float_of_byte<ROOM>(_mm512_loadu_si512(all + step / 4 * 64), step % 4));
  }
};

struct PairDot : FloatProducts {
  static constexpr Element WEIGHT = Element::I4, PANEL = Element::F32;
  static constexpr int STEPS = 16, UNIT_STEPS = 8, PARTS = 2, PART_CODES = 2;

  // vpermd and vpermps read the low four bits of each lane: a code, a nibble.
  template <bool ROOM>
  static SPARSE24_INLINE __m512i control(const uint8_t* all, int step) {
    const __m512i codes = _mm512_srli_epi32(_mm512_loadu_si512(all), step / 4 * 4);
    return _mm512_permutexvar_epi32(codes, constant<ROOM>(TABLES.slot[step / 4 % 2][step % 4]));
  }

  template <bool ROOM>
  static SPARSE24_INLINE __m512i values(const uint8_t* all, int step) {
    return nibble<ROOM>(all, step);
  }
};

constexpr Kernels I8_KERNELS = kernels_of<TwoFourDot<Element::I8>>(pack_floats<false>);
constexpr Kernels I4_KERNELS = kernels_of<PairDot>(pack_floats<false>);
constexpr Kernels I4_TWO_FOUR_KERNELS = kernels_of<TwoFourDot<Element::I4_TWO_FOUR>>(pack_floats<false>);

}  // namespace

const Kernels* avx512_weight_only_kernels(Element weight) {
  return weight == Element::I8   ? &I8_KERNELS
         : weight == Element::I4 ? &I4_KERNELS
         : is_int4(weight)       ? &I4_TWO_FOUR_KERNELS
                                 : nullptr;
}

}  // namespace sparse24::cpu
