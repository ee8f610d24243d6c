// W decoded with AVX2, for a dense product. A byte shuffle moves the values of a group to their columns, and zeros to
// the others: the shuffle is looked up by the group's code.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "csrc/cpu/linear/linear_dense.h"

namespace sparse24::cpu {
namespace {

// Shuffles by the group's code. The group's two units of UNIT bytes lie in a vector from byte FROM on; bytes
// [TO, TO + 16) of its four columns' worth are made.
template <int UNIT, int FROM, int TO = 0>
struct Spread {
  uint8_t bytes[16][16];
  constexpr Spread() : bytes() {
    for (int code = 0; code < 16; ++code) {
      for (int i = 0; i < 16; ++i) {
        const int unit = (TO + i) / UNIT, byte = (TO + i) % UNIT;
        bytes[code][i] = static_cast<uint8_t>(unit == second_of(code)  ? FROM + UNIT + byte
                                              : unit == first_of(code) ? FROM + byte
                                                                       : 0x80);
      }
    }
  }
};
template <int UNIT, int FROM, int TO = 0>
alignas(64) constexpr Spread<UNIT, FROM, TO> SPREAD;

template <int UNIT, int FROM, int TO = 0>
SPARSE24_INLINE __m128i spread(__m128i values, uint32_t code) {
  const auto shuffle = reinterpret_cast<const __m128i*>(SPREAD<UNIT, FROM, TO>.bytes[code]);
  return _mm_shuffle_epi8(values, _mm_load_si128(shuffle));
}

SPARSE24_INLINE __m128i load_128(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
SPARSE24_INLINE __m128i load_32(const void* from) {
  int word;
  __builtin_memcpy(&word, from, sizeof word);
  return _mm_cvtsi32_si128(word);
}
SPARSE24_INLINE uint32_t code_at(const uint8_t* codes, int row, int group) {
  return codes[row * 4 + group / 2] >> group % 2 * 4 & 15;
}

SPARSE24_INLINE void store_128(void* to, __m128i vector) { _mm_storeu_si128(static_cast<__m128i*>(to), vector); }
SPARSE24_INLINE void store_64(void* to, __m128i vector) { _mm_storel_epi64(static_cast<__m128i*>(to), vector); }
SPARSE24_INLINE void store_32(void* to, __m128i vector) {
  const int word = _mm_cvtsi128_si32(vector);
  __builtin_memcpy(to, &word, sizeof word);
}

// ---- Chunks of float weights: eight groups of four columns ----

// As floats: the two values of `group` of rows row and row + 1 (low), row + 2 and row + 3 (high).
template <Element WEIGHT>
SPARSE24_INLINE void load_pairs(const uint8_t* values, int group, int row, __m128i& low, __m128i& high) {
  if constexpr (WEIGHT == Element::BF16) {
    const __m128i pairs = load_128(values + (group * BLOCK_ROWS + row) * 4);
    low = _mm_unpacklo_epi16(_mm_setzero_si128(), pairs);
    high = _mm_unpackhi_epi16(_mm_setzero_si128(), pairs);
  } else {
    const auto slot = [&](int index) __attribute__((always_inline)) {
      const uint8_t* const at = values + (index * BLOCK_ROWS + row) * element_bits(WEIGHT) / 8;
      if constexpr (WEIGHT == Element::F32) return load_128(at);
      return _mm_castps_si128(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at))));
    };
    const __m128i first = slot(2 * group), second = slot(2 * group + 1);
    low = _mm_unpacklo_epi32(first, second);
    high = _mm_unpackhi_epi32(first, second);
  }
}

template <Element WEIGHT>
SPARSE24_INLINE void decode_chunk(const uint8_t* chunk, float* rows, int64_t stride) {
  for (int row = 0; row < BLOCK_ROWS; row += 4) {
#pragma GCC unroll 8
    for (int group = 0; group < 8; ++group) {
      __m128i low, high;
      load_pairs<WEIGHT>(chunk + CODES_BYTES, group, row, low, high);
      float* const to = rows + row * stride + 4 * group;
      store_128(to, spread<4, 0>(low, code_at(chunk, row, group)));
      store_128(to + stride, spread<4, 8>(low, code_at(chunk, row + 1, group)));
      store_128(to + 2 * stride, spread<4, 0>(high, code_at(chunk, row + 2, group)));
      store_128(to + 3 * stride, spread<4, 8>(high, code_at(chunk, row + 3, group)));
    }
  }
}

template <Element WEIGHT>
SPARSE24_INLINE void decode_chunk(const uint8_t* chunk, uint16_t* rows, int64_t stride) {
  for (int row = 0; row < BLOCK_ROWS; ++row) {
#pragma GCC unroll 8
    for (int group = 0; group < 8; ++group) {
      const __m128i pair = load_32(chunk + CODES_BYTES + (group * BLOCK_ROWS + row) * 4);
      store_64(rows + row * stride + 4 * group, spread<2, 0>(pair, code_at(chunk, row, group)));
    }
  }
}

// ---- Chunks of integer weights: 64 columns, for each row eight quads of values ----

// Of I4 those of group `quad`, eight columns; of I8 and I4_TWO_FOUR those of groups 2 * quad and 2 * quad + 1.
template <Element WEIGHT>
SPARSE24_INLINE __m128i load_quad(const uint8_t* values, int quad, int row) {
  if constexpr (WEIGHT == Element::I8) return load_32(values + (quad * BLOCK_ROWS + row) * 4);
  const __m128i nibbles = load_32(values + (quad / 2 * BLOCK_ROWS + row) * 4);
  const __m128i low = _mm_and_si128(quad % 2 == 0 ? nibbles : _mm_srli_epi16(nibbles, 4), _mm_set1_epi8(15));
  return _mm_sub_epi8(_mm_xor_si128(low, _mm_set1_epi8(8)), _mm_set1_epi8(8));  // the sign
}

template <Element WEIGHT, class Value>
SPARSE24_INLINE void decode_quads(const uint8_t* chunk, Value* rows, int64_t stride) {
  for (int row = 0; row < BLOCK_ROWS; ++row) {
#pragma GCC unroll 8
    for (int quad = 0; quad < 8; ++quad) {
      Value* const to = rows + row * stride + 8 * quad;
      __m128i values = load_quad<WEIGHT>(chunk + chunk_codes_bytes(WEIGHT), quad, row);
      constexpr bool FLOATS = sizeof(Value) == 4;
      if constexpr (FLOATS) values = _mm_castps_si128(_mm_cvtepi32_ps(_mm_cvtepi8_epi32(values)));
      if constexpr (WEIGHT != Element::I4) {
        const uint8_t* const codes = chunk + quad / 4 * CODES_BYTES;
        const uint32_t first = code_at(codes, row, 2 * quad % 8), second = code_at(codes, row, 2 * quad % 8 + 1);
        if constexpr (FLOATS) {
          store_128(to, spread<4, 0>(values, first));
          store_128(to + 4, spread<4, 8>(values, second));
        } else {
          store_32(to, spread<1, 0>(values, first));
          store_32(to + 4, spread<1, 2>(values, second));
        }
      } else {
        const uint32_t code = code_at(chunk, row, quad);
        if constexpr (FLOATS) {
          store_128(to, spread<8, 0>(values, code));
          store_128(to + 4, spread<8, 0, 16>(values, code));
        } else {
          store_64(to, spread<2, 0>(values, code));
        }
      }
    }
  }
}
template <>
SPARSE24_INLINE void decode_chunk<Element::I8>(const uint8_t* chunk, float* rows, int64_t stride) {
  decode_quads<Element::I8>(chunk, rows, stride);
}
template <>
SPARSE24_INLINE void decode_chunk<Element::I4>(const uint8_t* chunk, float* rows, int64_t stride) {
  decode_quads<Element::I4>(chunk, rows, stride);
}
template <>
SPARSE24_INLINE void decode_chunk<Element::I4_TWO_FOUR>(const uint8_t* chunk, float* rows, int64_t stride) {
  decode_quads<Element::I4_TWO_FOUR>(chunk, rows, stride);
}
template <Element WEIGHT>
SPARSE24_INLINE void decode_chunk(const uint8_t* chunk, int8_t* rows, int64_t stride) {
  decode_quads<WEIGHT>(chunk, rows, stride);
}

// ---- Blocks ----

template <Element WEIGHT, class Value>
void decode_block(const Linear& call, int64_t block, Value* rows, int64_t stride) {
  const uint8_t* chunk = call.packed + block * block_bytes(call);
  const uint8_t* const end = chunk + chunk_count(WEIGHT, call.in_features) * chunk_bytes(WEIGHT);
  for (; chunk < end; chunk += chunk_bytes(WEIGHT), rows += chunk_columns(WEIGHT)) {
    decode_chunk<WEIGHT>(chunk, rows, stride);
  }
}

void decode_floats(const Linear& call, int64_t block, float* rows, int64_t stride) {
  switch (call.weight) {
    case Element::F32:
      return decode_block<Element::F32>(call, block, rows, stride);
    case Element::F16:
      return decode_block<Element::F16>(call, block, rows, stride);
    case Element::BF16:
      return decode_block<Element::BF16>(call, block, rows, stride);
    case Element::I8:
      return decode_block<Element::I8>(call, block, rows, stride);
    case Element::I4:
      return decode_block<Element::I4>(call, block, rows, stride);
    default:
      return decode_block<Element::I4_TWO_FOUR>(call, block, rows, stride);
  }
}

void decode_bf16(const Linear& call, int64_t block, uint16_t* rows, int64_t stride) {
  decode_block<Element::BF16>(call, block, rows, stride);
}

void decode_int8(const Linear& call, int64_t block, int8_t* rows, int64_t stride) {
  if (call.weight == Element::I8) return decode_block<Element::I8>(call, block, rows, stride);
  decode_block<Element::I4>(call, block, rows, stride);
}

}  // namespace

const DenseDecode AVX2_DECODE{decode_floats, decode_bf16, decode_int8};

}  // namespace sparse24::cpu
