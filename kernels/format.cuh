// The 2:4 format: patterns, elements, groups and the 2-bit codes, for host and device alike (docs/format.md).
//
// A group is four units: four adjacent columns, or for pair 4:8 four adjacent pairs of columns. Two units stay. The
// group's code is a nibble i0 | i1 << 2 with i0 < i1; a byte of `meta` holds two codes, the earlier group low.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SPARSE24_INLINE __host__ __device__ __forceinline__
#else
// Forced inline: files built for a wider instruction set must not leave a copy of these that others could link to.
#define SPARSE24_INLINE inline __attribute__((always_inline))
#endif

namespace sparse24 {

enum class Pattern { TWO_FOUR, ONE_TWO, PAIR_FOUR_EIGHT };

// I4 is two's complement, two columns a byte, the even column low. Where an element alone tells what a product
// multiplies by, I4 is a weight in pair 4:8 and I4_TWO_FOUR one in 2:4; as a type of numbers it is I4 whatever keeps
// them.
enum class Element { F32, F16, BF16, I8, I4, I4_TWO_FOUR };

SPARSE24_INLINE constexpr bool is_int4(Element element) {
  return element == Element::I4 || element == Element::I4_TWO_FOUR;
}
SPARSE24_INLINE constexpr int element_bits(Element element) {
  return element == Element::F32 ? 32 : element == Element::I8 ? 8 : is_int4(element) ? 4 : 16;
}

// Columns in one group.
SPARSE24_INLINE constexpr int group_columns(Pattern pattern) { return pattern == Pattern::PAIR_FOUR_EIGHT ? 8 : 4; }

SPARSE24_INLINE constexpr int64_t group_count(Pattern pattern, int64_t in_features) {
  return (in_features + group_columns(pattern) - 1) / group_columns(pattern);
}

// Bytes of `values` and of `meta` in one row; int4 rows are packed two to a byte.
SPARSE24_INLINE constexpr int64_t values_row_bytes(Pattern pattern, Element element, int64_t in_features) {
  return group_count(pattern, in_features) * (group_columns(pattern) / 2) * element_bits(element) / 8;
}
SPARSE24_INLINE constexpr int64_t meta_row_bytes(Pattern pattern, int64_t in_features) {
  return (group_count(pattern, in_features) + 1) / 2;
}
// Bytes of one dense row.
SPARSE24_INLINE constexpr int64_t dense_row_bytes(Element element, int64_t in_features) {
  return (in_features * element_bits(element) + 7) / 8;
}

SPARSE24_INLINE constexpr int code_of(int i0, int i1) { return i0 | (i1 << 2); }
SPARSE24_INLINE constexpr int first_of(int code) { return code & 3; }
SPARSE24_INLINE constexpr int second_of(int code) { return (code >> 2) & 3; }

// Ordered codes only: (0,1) 0x4, (0,2) 0x8, (1,2) 0x9, (0,3) 0xC, (1,3) 0xD, (2,3) 0xE; 1:2 keeps one of each half.
SPARSE24_INLINE constexpr bool is_legal(Pattern pattern, int code) {
  return pattern == Pattern::ONE_TWO ? first_of(code) < 2 && second_of(code) >= 2 : first_of(code) < second_of(code);
}

// Selection works on words of several groups, one bit a unit, the first unit lowest: 4 bits a group, 16 groups in 64
// bits. `keep` has exactly two bits of each group set. Word is uint32_t or uint64_t.

template <class Word>
SPARSE24_INLINE constexpr Word each_group(unsigned nibble) {
  return ~Word{0} / 15 * nibble;
}

// Which units of a group beat an earlier one. `next`: 1 beats 0, 2 beats 1, 3 beats 2, and in bit 3: 3 beats 0.
// `opposite`: 2 beats 0, 3 beats 1, bits 2 and 3 are ignored. A later unit must be strictly larger: ties go to the
// lower index.
template <class Word>
struct Beats {
  Word next;
  Word opposite;
};

// keep: for 2:4 and pair 4:8 the two best of each group, for 1:2 the better one of each half.
template <Pattern PATTERN, class Word>
SPARSE24_INLINE constexpr Word keep_best(Beats<Word> beats) {
  if constexpr (PATTERN == Pattern::ONE_TWO) {
    const Word second = beats.next & each_group<Word>(0b0101);
    return (second << 1) | (second ^ each_group<Word>(0b0101));
  } else {
    // Unit i stays if it wins two of its three matches: against units i + 1, i + 2 and i + 3 (mod 4).
    const Word one = beats.next ^ each_group<Word>(0b0111);
    const Word late = beats.opposite & each_group<Word>(0b0011);
    const Word two = (late << 2) | (late ^ each_group<Word>(0b0011));
    const Word three = ~(((one & each_group<Word>(0b0111)) << 1) | ((one & each_group<Word>(0b1000)) >> 3));
    return (one & two) | (three & (one | two));
  }
}

// For exact compression a nonzero unit beats every earlier one: all nonzero ones stay, and free slots go to the lowest
// unused index. Only for groups that are not overfull.
template <class Word>
SPARSE24_INLINE constexpr Beats<Word> nonzero_beats(Word nonzero) {
  return {((nonzero >> 1) & each_group<Word>(0b0111)) | (nonzero & each_group<Word>(0b1000)), nonzero >> 2};
}

// Bit 0 of every group that has more nonzero units than its pattern keeps.
template <Pattern PATTERN, class Word>
SPARSE24_INLINE constexpr Word overfull(Word nonzero) {
  const Word both = nonzero & (nonzero >> 1);  // in bits 0 and 2: both units of the half
  if constexpr (PATTERN == Pattern::ONE_TWO) return (both | (both >> 2)) & each_group<Word>(0b0001);
  const Word any = nonzero | (nonzero >> 1);
  return ((both & (any >> 2)) | ((both >> 2) & any)) & each_group<Word>(0b0001);
}

// keep -> codes, group by group in place: a 64-bit word of codes is eight bytes of meta, lowest first.
template <class Word>
SPARSE24_INLINE constexpr Word codes_of(Word keep) {
  const Word first = each_group<Word>(0b0001);
  const Word k0 = keep, k1 = keep >> 1, k3 = keep >> 3;
  return ((~k0 & k1) & first) | (((~k0 & ~k1) & first) << 1) | (((k3 | (k0 & k1)) & first) << 2) |
         ((~(k0 & k1) & first) << 3);
}

// Bit 0 of every group whose code is not legal.
template <Pattern PATTERN, class Word>
SPARSE24_INLINE constexpr Word illegal(Word codes) {
  const Word low_0 = codes, high_0 = codes >> 1, low_1 = codes >> 2, high_1 = codes >> 3;
  const Word halves = ~high_0 & high_1;  // i0 in {0, 1}, i1 in {2, 3}
  if constexpr (PATTERN == Pattern::ONE_TWO) return ~halves & each_group<Word>(0b0001);
  return ~(halves | (~(high_0 ^ high_1) & ~low_0 & low_1)) & each_group<Word>(0b0001);
}

// codes -> keep. A code that is illegal for 2:4 reads as 0x4, so keep has two bits a group whatever memory holds.
template <class Word>
SPARSE24_INLINE constexpr Word keep_of(Word codes) {
  const Word bad = illegal<Pattern::TWO_FOUR>(codes);
  const Word legal = (codes & ~(bad * 0b1111)) | (bad << 2);
  const Word low_0 = legal, high_0 = legal >> 1, low_1 = legal >> 2, high_1 = legal >> 3;
  const Word first = each_group<Word>(0b0001);
  return ((~low_0 & ~high_0) & first) | (((low_0 | (low_1 & ~high_1)) & first) << 1) |
         (((high_0 | (high_1 & ~low_1)) & first) << 2) | (((high_1 & low_1) & first) << 3);
}

// Magnitudes: integers in the order of |x| that are equal where magnitudes tie. All NaNs are equal and largest.

// The low bits of `bits` hold one element; 32, 16, 16, 8 and 4 of them are read.
template <Element ELEMENT>
SPARSE24_INLINE constexpr uint32_t magnitude(uint32_t bits) {
  if constexpr (ELEMENT == Element::I8 || ELEMENT == Element::I4) {
    constexpr uint32_t SIGN = 1u << (element_bits(ELEMENT) - 1);
    const uint32_t x = bits & (2 * SIGN - 1), negative = 0 - x / SIGN;  // 0 or all ones
    return ((x ^ negative) - negative) & (2 * SIGN - 1);
  } else {
    constexpr uint32_t INFINITE = ELEMENT == Element::F32 ? 0x7f800000 : ELEMENT == Element::F16 ? 0x7c00 : 0x7f80;
    const uint32_t x = bits & (ELEMENT == Element::F32 ? 0x7fffffff : 0x7fff);
    return x > INFINITE ? INFINITE + 1 : x;
  }
}

// |x| as float32, exactly, from the bits of |x|.
template <Element ELEMENT>
SPARSE24_INLINE float widen(uint32_t bits) {
  if constexpr (ELEMENT == Element::BF16) bits <<= 16;
  if constexpr (ELEMENT == Element::F16) {
    if (bits < 0x400) return static_cast<float>(bits) * 0x1p-24f;  // subnormal; exact also where floats flush to zero
    bits = bits < 0x7c00 ? (bits << 13) + (112u << 23) : 0x7f800000 | ((bits & 0x3ff) << 13);
  }
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// |a| + |b|: exact for integers, one IEEE addition in float32 for floats.
template <Element ELEMENT>
SPARSE24_INLINE uint32_t pair_magnitude(uint32_t a, uint32_t b) {
  if constexpr (ELEMENT == Element::I8 || ELEMENT == Element::I4) {
    return magnitude<ELEMENT>(a) + magnitude<ELEMENT>(b);
  } else {
    const float sum = widen<ELEMENT>(magnitude<ELEMENT>(a)) + widen<ELEMENT>(magnitude<ELEMENT>(b));
    uint32_t bits;
    memcpy(&bits, &sum, sizeof bits);
    return magnitude<Element::F32>(bits);
  }
}

}  // namespace sparse24
