// linear() in AVX2: a block's 16 rows are two vectors of eight. Floats: a group of four columns of x is broadcast to
// both halves of a vector, where vpermilps picks a column by two bits of each lane. Integers: eight bytes of x, two
// groups, are broadcast, vpshufb picks four a lane, and they are multiplied so that no sum can saturate.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <algorithm>
#include <utility>

#include "csrc/cpu/linear/activations.h"
#include "csrc/cpu/linear/linear_kernels.h"
#include "csrc/cpu/quantize.h"

namespace sparse24::cpu {
namespace {

// Rows of x that share the decoding of W, in what fits 16 registers: four for both halves of a block at a time, or
// eight for one half. Eight suit integers, whose control takes many steps; floats would load each x twice as often.
constexpr int ROWS_OF_BOTH_HALVES = 4;

SPARSE24_INLINE __m256i load(const uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }

// ---- Elements ----

// Eight elements from `index` on as floats.
SPARSE24_INLINE __m256 load_floats(const void* array, Element element, int64_t index) {
  if (element == Element::F32) return _mm256_loadu_ps(static_cast<const float*>(array) + index);
  const auto half = static_cast<const uint16_t*>(array) + index;
  const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(half));
  if (element == Element::F16) return _mm256_cvtph_ps(eight);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16));
}

SPARSE24_INLINE float load_float(const void* array, Element element, int64_t index) {
  if (element == Element::F32) return static_cast<const float*>(array)[index];
  const uint16_t half = static_cast<const uint16_t*>(array)[index];
  return element == Element::F16 ? _cvtsh_ss(half) : __builtin_bit_cast(float, static_cast<uint32_t>(half) << 16);
}

// The bfloat16 nearest to each lane, ties to even, as a float; a NaN stays one.
SPARSE24_INLINE uint32_t round_to_bf16(float v) {
  const auto bits = __builtin_bit_cast(uint32_t, v);
  const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1), quiet = bits | 0x00400000;
  return (v == v ? rounded : quiet) & 0xffff0000;
}

// `count` of sixteen floats to y; contiguous.
void store_floats(void* y, Element element, int64_t index, int count, const float* v) {
  if (element == Element::F32) {
    std::copy_n(v, count, static_cast<float*>(y) + index);
    return;
  }
  uint16_t half[BLOCK_ROWS];
  if (element == Element::F16) {
    for (int i = 0; i < BLOCK_ROWS; i += 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(half + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(v + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
  } else {
    for (int i = 0; i < BLOCK_ROWS; ++i) half[i] = static_cast<uint16_t>(round_to_bf16(v[i]) >> 16);
  }
  std::copy_n(half, count, static_cast<uint16_t*>(y) + index);
}

// ---- Rows of x ----

// Calls store(k, eight floats) for all columns of the panel, those past the end of x as zeros.
template <class Store>
SPARSE24_INLINE void for_each_8(const Strip& strip, int row, const Store& store) {
  const void* const x = strip.rows[row];
  int64_t k = 0;
  for (; k + 8 <= strip.in_features; k += 8) store(k, load_floats(x, strip.x_element, k));
  for (; k < strip.columns; k += 8) {
    alignas(32) float tail[8] = {};
    for (int64_t i = 0; i < 8 && k + i < strip.in_features; ++i) tail[i] = load_float(x, strip.x_element, k + i);
    store(k, _mm256_load_ps(tail));
  }
}

SPARSE24_INLINE uint8_t* column_of(const Strip& strip, int row, int64_t k, int bytes) {
  const int64_t at = k * bytes;
  return strip.panel + (at / UNIT_BYTES * strip.panel_rows + strip.row + row) * UNIT_BYTES + at % UNIT_BYTES;
}

template <bool ROUND_TO_BF16>
void pack_floats(const Strip& strip) {
  for (int row = 0; row < strip.count; ++row) {
    for_each_8(strip, row, [&](int64_t k, __m256 v) {
      if (ROUND_TO_BF16) {
        alignas(32) float floats[8];
        _mm256_store_ps(floats, v);
        for (float& f : floats) f = __builtin_bit_cast(float, round_to_bf16(f));
        v = _mm256_load_ps(floats);
      }
      _mm256_store_ps(reinterpret_cast<float*>(column_of(strip, row, k, 4)), v);
    });
  }
}

// q, with its sign, and each row's own scale (quantize.h).
void quantize_rows(const Strip& strip) {
  for (int row = 0; row < strip.count; ++row) {
    const float scale = scale_of(portable_quantizer().largest(strip.rows[row], strip.x_element, strip.in_features));
    strip.scales[row] = scale;
    const __m256 s = _mm256_set1_ps(scale);
    for_each_8(strip, row, [&](int64_t k, __m256 v) {
      // max_ps gives its second operand for NaN.
      const __m256 clamped =
          _mm256_min_ps(_mm256_max_ps(_mm256_div_ps(v, s), _mm256_set1_ps(-127)), _mm256_set1_ps(127));
      const __m256i q = _mm256_cvtps_epi32(clamped);
      const __m256i words = _mm256_packs_epi32(q, q), bytes = _mm256_packs_epi16(words, words);
      const uint64_t eight = static_cast<uint32_t>(_mm256_extract_epi32(bytes, 0)) |
                             static_cast<uint64_t>(static_cast<uint32_t>(_mm256_extract_epi32(bytes, 4))) << 32;
      __builtin_memcpy(column_of(strip, row, k, 1), &eight, sizeof eight);
    });
  }
}

// int8 as it is, stored as q + 128.
void pack_int8(const Strip& strip) { portable_kernels(Element::I8, false, Element::I8)->pack(strip); }

// ---- Dot products: each adds one group's (integers: two groups') products for eight rows of W and ROWS of x ----

// The values of slot 2 * group + second of eight rows. `values` and `codes` begin at the half's rows.
template <Element WEIGHT>
SPARSE24_INLINE __m256 float_values(const uint8_t* values, int slot) {
  if constexpr (WEIGHT == Element::F32) return _mm256_loadu_ps(reinterpret_cast<const float*>(values + 64 * slot));
  if constexpr (WEIGHT == Element::F16) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values + 32 * slot)));
  }
  if constexpr (WEIGHT == Element::BF16) {
    const __m256i both = load(values + slot / 2 * 64);
    return _mm256_castsi256_ps(slot % 2 == 0 ? _mm256_slli_epi32(both, 16)
                                             : _mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
  }
  if constexpr (WEIGHT == Element::I8) {
    const __m256i four = load(values + slot / 4 * 64);
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(four, 24 - slot % 4 * 8), 24));
  }
  const __m256i eight = load(values + slot / 8 * 64);  // int4
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(eight, 28 - slot % 4 * 8 - slot / 4 % 2 * 4), 28));
}

template <Element ELEMENT>
struct FloatDot {
  static constexpr Element WEIGHT = ELEMENT, PANEL = Element::F32;
  static constexpr int PASS_ROWS = ROWS_OF_BOTH_HALVES;
  static constexpr int GROUPS = 1, GROUP_BYTES = group_columns(pattern_of(ELEMENT)) * 4;  // a step; of x
  static constexpr bool COMPENSATED = false;
  using Sum = __m256;
  static SPARSE24_INLINE Sum zero() { return _mm256_setzero_ps(); }

  template <int ROWS>
  static SPARSE24_INLINE void add(Sum (&sums)[ROWS], __m256i codes, const uint8_t* values, int group,
                                  const uint8_t* x) {
    constexpr int SLOTS = group_columns(pattern_of(WEIGHT)) / 2;
    codes = _mm256_srli_epi32(codes, group % 8 * 4);
#pragma GCC unroll 4
    for (int slot = 0; slot < SLOTS; ++slot) {
      const __m256 v = float_values<WEIGHT>(values, group * SLOTS + slot);
#pragma GCC unroll 8
      for (int row = 0; row < ROWS; ++row) {
        __m256 picked;
        if constexpr (WEIGHT == Element::I4) {  // of eight columns, by three bits: a pair and which of it
          const __m256i pair =
              _mm256_and_si256(_mm256_slli_epi32(_mm256_srli_epi32(codes, slot / 2 * 2), 1), _mm256_set1_epi32(6));
          picked = _mm256_permutevar8x32_ps(_mm256_loadu_ps(reinterpret_cast<const float*>(x + row * UNIT_BYTES)),
                                            _mm256_or_si256(pair, _mm256_set1_epi32(slot % 2)));
        } else {
          const __m256 four = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x + row * UNIT_BYTES));
          picked = _mm256_permutevar_ps(four, _mm256_srli_epi32(codes, 2 * slot));
        }
        sums[row] = _mm256_fmadd_ps(picked, v, sums[row]);
      }
    }
  }
};

// SIGNED: the panel holds q, none of them -128, which are what quantize_rows makes; else q + 128, of any q.
template <Element ELEMENT, bool SIGNED>
struct IntegerDot {
  static constexpr Element WEIGHT = ELEMENT, PANEL = Element::I8;
  static constexpr bool COMPENSATED = !SIGNED;
  static constexpr int PASS_ROWS = 2 * ROWS_OF_BOTH_HALVES;
  static constexpr int GROUPS = ELEMENT == Element::I8 ? 2 : 1, GROUP_BYTES = 8 / GROUPS;
  using Sum = __m256i;
  static SPARSE24_INLINE Sum zero() { return _mm256_setzero_si256(); }

  // For each lane the places, among eight columns, of the four bytes that its four values meet.
  static SPARSE24_INLINE __m256i control(__m256i codes, int group) {
    if constexpr (WEIGHT == Element::I8) {  // four indices of two bits, and the second group begins at column 4
      const __m256i c = _mm256_and_si256(_mm256_srli_epi32(codes, group % 8 * 4), _mm256_set1_epi32(0xff));
      const __m256i two = _mm256_or_si256(c, _mm256_slli_epi32(c, 6));
      const __m256i four = _mm256_or_si256(two, _mm256_slli_epi32(two, 12));
      return _mm256_or_si256(_mm256_and_si256(four, _mm256_set1_epi8(3)), _mm256_set1_epi32(0x04040000));
    }
    // Two indices of pairs: columns 2 i and 2 i + 1 of each.
    const __m256i c = _mm256_and_si256(_mm256_srli_epi32(codes, group % 8 * 4), _mm256_set1_epi32(15));
    const __m256i pairs = _mm256_or_si256(_mm256_slli_epi32(c, 1), _mm256_slli_epi32(c, 15));
    const __m256i four = _mm256_or_si256(pairs, _mm256_slli_epi32(pairs, 8));
    return _mm256_or_si256(_mm256_and_si256(four, _mm256_set1_epi8(6)), _mm256_set1_epi32(0x01000100));
  }

  static SPARSE24_INLINE __m256i values(const uint8_t* values, int group) {
    if constexpr (WEIGHT == Element::I8) return load(values + group / 2 * 64);
    const __m256i both = load(values + group / 2 * 64);
    return _mm256_and_si256(group % 2 == 0 ? _mm256_slli_epi32(both, 4) : both,
                            _mm256_set1_epi8(static_cast<char>(0xf0)));
  }

  template <int ROWS>
  static SPARSE24_INLINE void add(Sum (&sums)[ROWS], __m256i codes, const uint8_t* all, int group, const uint8_t* x) {
    const __m256i pick = control(codes, group), v = values(all, group);
    const auto picked = [&](int row) {
      int64_t columns;
      __builtin_memcpy(&columns, x + row * UNIT_BYTES, sizeof columns);
      return _mm256_shuffle_epi8(_mm256_set1_epi64x(columns), pick);
    };
    if constexpr (SIGNED) {  // |v| times q with the sign of v: two products sum to at most 2 * 128 * 127
      const __m256i magnitude = _mm256_abs_epi8(v), ones = _mm256_set1_epi16(1);
#pragma GCC unroll 8
      for (int row = 0; row < ROWS; ++row) {
        const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(picked(row), v));
        sums[row] = _mm256_add_epi32(sums[row], _mm256_madd_epi16(pairs, ones));
      }
    } else {  // bytes as 16 bits, even and odd ones apart
      const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), odd = _mm256_srai_epi16(v, 8);
#pragma GCC unroll 8
      for (int row = 0; row < ROWS; ++row) {
        const __m256i low = _mm256_and_si256(picked(row), _mm256_set1_epi16(0xff));
        const __m256i high = _mm256_srli_epi16(picked(row), 8);
        sums[row] =
            _mm256_add_epi32(sums[row], _mm256_add_epi32(_mm256_madd_epi16(low, even), _mm256_madd_epi16(high, odd)));
      }
    }
  }
};

// ---- The epilogue ----

// y of one token and block: `count` output features, from sums that are scaled already.
template <Activation ACTIVATION>
void finish_row(const Linear& call, int64_t token, int64_t column, int count, float* v) {
  const Epilogue& epilogue = call.epilogue;
  if (epilogue.bias) {
    for (int i = 0; i < count; ++i) v[i] += load_float(epilogue.bias, element_of(epilogue.bias_type), column + i);
  }
  if (epilogue.residual) {
    const int64_t at = token * epilogue.residual_stride + column;
    for (int i = 0; i < count; ++i) v[i] += load_float(epilogue.residual, element_of(epilogue.residual_type), at + i);
  }
  for (int i = 0; i < BLOCK_ROWS; ++i) v[i] = activate<ACTIVATION>(v[i]);
  if (epilogue.y_type == Number::I8) {
    for (int i = 0; i < count; ++i) {
      const float quotient = v[i] / *epilogue.y_scale;
      const float q = std::min(std::max(-127.0f, quotient), 127.0f) + 12582912.0f - 12582912.0f;
      static_cast<int8_t*>(epilogue.y)[call.y_index(token, column + i)] =
          quotient == quotient ? static_cast<int8_t>(static_cast<int>(q)) : int8_t{0};
    }
  } else if (call.plane == 0) {
    store_floats(epilogue.y, element_of(epilogue.y_type), call.y_index(token, column), count, v);
  } else {
    for (int i = 0; i < count; ++i) {
      float one[BLOCK_ROWS] = {v[i]};
      store_floats(epilogue.y, element_of(epilogue.y_type), call.y_index(token, column + i), 1, one);
    }
  }
}

using FinishRow = void (*)(const Linear& call, int64_t token, int64_t column, int count, float* v);
FinishRow finish_for(Activation activation) {
  switch (activation) {
    case Activation::RELU:
      return finish_row<Activation::RELU>;
    case Activation::GELU:
      return finish_row<Activation::GELU>;
    case Activation::GELU_TANH:
      return finish_row<Activation::GELU_TANH>;
    case Activation::SILU:
      return finish_row<Activation::SILU>;
    default:
      return finish_row<Activation::NONE>;
  }
}

// Of sums of floats, or of the totals of scale groups.
template <bool>
void finish(const Linear& call, const Tile& tile, int row, int64_t block, const __m256 (&sums)[2]) {
  alignas(32) float v[BLOCK_ROWS];
  for (int half = 0; half < 2; ++half) _mm256_store_ps(v + 8 * half, sums[half]);
  const int64_t column = block * BLOCK_ROWS;
  const int count = static_cast<int>(std::min<int64_t>(BLOCK_ROWS, call.epilogue.out_features - column));
  if (call.group_size) {
    for (int i = 0; tile.x_scales && i < count; ++i) v[i] *= tile.x_scales[row];
  } else if (call.epilogue.scales) {
    for (int i = 0; i < count; ++i) v[i] *= call.epilogue.scales[column + i];
  }
  finish_for(call.epilogue.activation)(call, tile.first_token + row, column, count, v);
}

// The sums of the products of integers, of eight rows of W.
template <bool COMPENSATED>
SPARSE24_INLINE __m256i exact_sums(const Linear& call, int64_t block, int64_t group, int half, __m256i sums) {
  if (COMPENSATED) sums = _mm256_sub_epi32(sums, load(compensation_of(call, block, group) + 32 * half));
  return _mm256_sra_epi32(sums, _mm_cvtsi32_si128(sum_shift(call.weight)));
}

template <bool COMPENSATED>
void finish(const Linear& call, const Tile& tile, int row, int64_t block, const __m256i (&sums)[2]) {
  alignas(32) int32_t sum[BLOCK_ROWS];
  for (int half = 0; half < 2; ++half) {
    const __m256i exact = exact_sums<COMPENSATED>(call, block, 0, half, sums[half]);
    _mm256_store_si256(reinterpret_cast<__m256i*>(sum + 8 * half), exact);
  }
  const Epilogue& epilogue = call.epilogue;
  const int64_t column = block * BLOCK_ROWS, token = tile.first_token + row;
  const int count = static_cast<int>(std::min<int64_t>(BLOCK_ROWS, epilogue.out_features - column));
  if (epilogue.y_type == Number::I32) {
    for (int i = 0; i < count; ++i) static_cast<int32_t*>(epilogue.y)[call.y_index(token, column + i)] = sum[i];
    return;
  }
  alignas(32) float v[BLOCK_ROWS] = {};
  for (int i = 0; i < count; ++i)
    v[i] = static_cast<float>(sum[i]) * (tile.x_scales[row] * epilogue.scales[column + i]);
  finish_for(epilogue.activation)(call, token, column, count, v);
}

// ---- Tiles ----

// The sums of rows [first, first + ROWS) of the panel and chunks [from, to) of one block, for its halves
// [begin, begin + HALVES).
template <class Dot, int ROWS, int HALVES>
void sum_rows(const Linear& call, const Tile& tile, int first, int64_t block, int64_t from, int64_t to, int begin,
              typename Dot::Sum (*results)[2]) {
  constexpr int COLUMNS = chunk_columns(Dot::WEIGHT), CHUNK_BYTES = chunk_bytes(Dot::WEIGHT);
  constexpr int GROUPS = COLUMNS / group_columns(pattern_of(Dot::WEIGHT));
  constexpr int HALF_BYTES = Dot::WEIGHT == Element::F16 ? 16 : 32;  // eight rows of a vector of values
  constexpr int CHUNK_UNITS = COLUMNS * (Dot::PANEL == Element::F32 ? 4 : 1) / UNIT_BYTES;
  const int64_t unit_stride = tile.panel_rows * UNIT_BYTES;
  const uint8_t* w = call.packed + block * block_bytes(call) + from * CHUNK_BYTES;
  const uint8_t* x = tile.panel + first * UNIT_BYTES + from * CHUNK_UNITS * unit_stride;
  typename Dot::Sum sums[HALVES][ROWS];
  for (auto& half : sums) {
    for (auto& sum : half) sum = Dot::zero();
  }
  for (int64_t chunk = from; chunk < to; ++chunk, w += CHUNK_BYTES) {
#pragma GCC unroll 16
    for (int group = 0; group < GROUPS; group += Dot::GROUPS) {
      const int at = group * Dot::GROUP_BYTES;
      const uint8_t* const columns = x + at / UNIT_BYTES * unit_stride + at % UNIT_BYTES;
#pragma GCC unroll 2
      for (int half = 0; half < HALVES; ++half) {
        const __m256i codes = load(w + group / 8 * CODES_BYTES + 32 * (begin + half));
        const uint8_t* const values = w + chunk_codes_bytes(Dot::WEIGHT) + (begin + half) * HALF_BYTES;
        Dot::template add<ROWS>(sums[half], codes, values, group, columns);
      }
    }
    x += CHUNK_UNITS * unit_stride;
  }
  for (int row = 0; row < ROWS; ++row) {
    for (int half = 0; half < HALVES; ++half) results[row][begin + half] = sums[half][row];
  }
}

// totals += sums * scales, of the scale group `group` and one row of x.
template <class Dot>
void add_group(const Linear& call, int64_t block, int64_t group, const typename Dot::Sum (&sums)[2],
               __m256 (&totals)[2]) {
  const int64_t column = block * BLOCK_ROWS, out_features = call.epilogue.out_features;
  alignas(32) float scales[BLOCK_ROWS] = {};
  std::copy_n(call.epilogue.scales + group * out_features + column,
              std::min<int64_t>(BLOCK_ROWS, out_features - column), scales);
  for (int half = 0; half < 2; ++half) {
    __m256 sum;
    if constexpr (Dot::PANEL == Element::I8) {
      sum = _mm256_cvtepi32_ps(exact_sums<Dot::COMPENSATED>(call, block, group, half, sums[half]));
    } else {
      sum = sums[half];
    }
    totals[half] = _mm256_add_ps(totals[half], _mm256_mul_ps(sum, _mm256_load_ps(scales + 8 * half)));
  }
}

template <class Dot, int ROWS>
void multiply_rows(const Linear& call, const Tile& tile, int first, int64_t block) {
  const int64_t chunks = chunk_count(Dot::WEIGHT, call.in_features), shared = group_chunks(call);
  typename Dot::Sum results[ROWS][2];
  __m256 totals[ROWS][2] = {};
  int64_t from = 0, group = 0;
  do {
    const int64_t to = std::min(from + shared, chunks);
    if constexpr (ROWS <= ROWS_OF_BOTH_HALVES) {
      sum_rows<Dot, ROWS, 2>(call, tile, first, block, from, to, 0, results);
    } else {
      for (int half = 0; half < 2; ++half) sum_rows<Dot, ROWS, 1>(call, tile, first, block, from, to, half, results);
    }
    if (call.group_size) {
      for (int row = 0; row < ROWS; ++row) add_group<Dot>(call, block, group, results[row], totals[row]);
    }
    from += shared, ++group;
  } while (from < chunks);
  for (int row = 0; row < ROWS; ++row) {
    if (call.group_size) {
      finish<false>(call, tile, first + row, block, totals[row]);
    } else {
      finish<Dot::COMPENSATED>(call, tile, first + row, block, results[row]);
    }
  }
}

template <class Dot, int... ROWS>
void multiply_rest(const Linear& call, const Tile& tile, int first, int64_t block,
                   std::integer_sequence<int, ROWS...>) {
  const int rows = tile.rows - first;
  ((rows == ROWS + 1 ? multiply_rows<Dot, ROWS + 1>(call, tile, first, block) : void()), ...);
}

template <class Dot>
void multiply(const Linear& call, const Tile& tile) {
  constexpr int PASS = Dot::PASS_ROWS;
  for (int64_t block = tile.first_block; block < tile.last_block; ++block) {
    int row = 0;
    for (; row + PASS <= tile.rows; row += PASS) multiply_rows<Dot, PASS>(call, tile, row, block);
    multiply_rest<Dot>(call, tile, row, block, std::make_integer_sequence<int, PASS - 1>());
  }
}

template <class Dot>
constexpr Kernels kernels_of(void (*pack)(const Strip&)) {
  return {"perm", Dot::PANEL, PANEL_ROWS, 1, pack, multiply<Dot>};
}

constexpr Kernels F32 = kernels_of<FloatDot<Element::F32>>(pack_floats<false>);
constexpr Kernels F16 = kernels_of<FloatDot<Element::F16>>(pack_floats<false>);
constexpr Kernels BF16 = kernels_of<FloatDot<Element::BF16>>(pack_floats<true>);
constexpr Kernels I8_ONLY = kernels_of<FloatDot<Element::I8>>(pack_floats<false>);
constexpr Kernels I4_ONLY = kernels_of<FloatDot<Element::I4>>(pack_floats<false>);
constexpr Kernels I4_TWO_FOUR = kernels_of<FloatDot<Element::I4_TWO_FOUR>>(pack_floats<false>);
constexpr Kernels I8[] = {kernels_of<IntegerDot<Element::I8, true>>(quantize_rows),
                          kernels_of<IntegerDot<Element::I8, false>>(pack_int8)};
constexpr Kernels I4[] = {kernels_of<IntegerDot<Element::I4, true>>(quantize_rows),
                          kernels_of<IntegerDot<Element::I4, false>>(pack_int8)};

}  // namespace

const Kernels* avx2_kernels(Element weight, bool weight_only, Element x_element) {
  const bool int8_x = x_element == Element::I8;
  switch (weight) {
    case Element::F16:
      return &F16;
    case Element::BF16:
      return &BF16;
    case Element::I8:
      return weight_only ? &I8_ONLY : &I8[int8_x];
    case Element::I4:
      return weight_only ? &I4_ONLY : &I4[int8_x];
    case Element::I4_TWO_FOUR:
      return &I4_TWO_FOUR;
    default:
      return &F32;
  }
}

}  // namespace sparse24::cpu
