// The AVX-512 version of the tensor cores' arithmetic: a row of D, 8 columns, in a vector. Chosen at run time.
// Everything here but the two entries is local to this file, so that no code compiled for AVX-512 is linked elsewhere.
//
// The blocks of the exact model are summed in 32-bit integers. A product of two significands has at most 22 bits, so it
// is exact in a float, and so is its scaling to the block's exponent; conversion to an integer then is the model's
// truncation. What does not fit that (infinities, NaNs, overflow, sums beyond 32 bits) is rare: it is noticed, and the
// whole multiplication is left to the portable version.
// g++ 12 takes the undefined operand inside its own unmasked intrinsics for a bug (gcc.gnu.org/PR105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstring>

#include "csrc/ptx/tensor/arithmetic.h"
#include "csrc/ptx/tensor/integer_products.h"

namespace sparse24::ptx::tensor {
namespace {

constexpr int MAX_FLOAT_DEPTH = 32, MAX_FLOAT_K = 64;  // of 8-bit types in mma.sp

// Elements in rows; B's rows are 8 wide.
struct Rows {
  alignas(64) float a[16 * MAX_FLOAT_DEPTH];
  alignas(64) float b[8 * MAX_FLOAT_K];
};

// ---- From registers to rows ----

// Where the elements of [k][n] are in the 8 rows [n][k] of a register, by their width; `h` is the half of k.
struct Transposition {
  alignas(64) uint16_t halves[2][32];
  alignas(64) uint32_t words[2][16];
  alignas(64) uint8_t bytes[2][64];
};
constexpr Transposition make_transposition() {
  Transposition order{};
  for (int h = 0; h < 2; ++h) {
    for (int i = 0; i < 32; ++i) order.halves[h][i] = static_cast<uint16_t>(8 * (i % 8) + 4 * h + i / 8);
    for (int i = 0; i < 16; ++i) order.words[h][i] = static_cast<uint32_t>(4 * (i % 8) + 2 * h + i / 8);
    for (int i = 0; i < 64; ++i) order.bytes[h][i] = static_cast<uint8_t>(16 * (i % 8) + 8 * h + i / 8);
  }
  return order;
}
constexpr Transposition TRANSPOSITION = make_transposition();

template <bool F16>
inline __m512 widen(__m256i halves) {
  if constexpr (F16) return _mm512_cvtph_ps(halves);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

template <bool F16>
inline void unpack_halves(const Multiplication& multiplication, Rows& rows) {
  const int high = multiplication.rows / 8, depth = multiplication.depth;
  for (int reg = 0; reg < high * depth / 8; ++reg) {
    float* const a = rows.a + (reg % high) * 8 * depth + reg / high * 8;
    for (int row = 0; row < 8; row += 2) {
      const __m512 two =
          widen<F16>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(multiplication.a[reg] + 4 * row)));
      _mm256_storeu_ps(a + row * depth, _mm512_castps512_ps256(two));
      _mm256_storeu_ps(a + (row + 1) * depth, _mm512_extractf32x8_ps(two, 1));
    }
  }
  for (int reg = 0; reg < multiplication.k / 8; ++reg) {
    const __m512i first = _mm512_loadu_si512(multiplication.b[reg]),
                  second = _mm512_loadu_si512(multiplication.b[reg] + 16);
    for (int h = 0; h < 2; ++h) {
      const __m512i turned = _mm512_permutex2var_epi16(first, _mm512_load_si512(TRANSPOSITION.halves[h]), second);
      float* const b = rows.b + 64 * reg + 32 * h;
      _mm512_store_ps(b, widen<F16>(_mm512_castsi512_si256(turned)));
      _mm512_store_ps(b + 16, widen<F16>(_mm512_extracti64x4_epi64(turned, 1)));
    }
  }
}

inline void unpack_tf32(const Multiplication& multiplication, Rows& rows) {
  const int high = multiplication.rows / 8, depth = multiplication.depth;
  const __m512i kept = _mm512_set1_epi32(~0x1fff);  // the low 13 bits are not part of the value
  for (int reg = 0; reg < high * depth / 4; ++reg) {
    float* const a = rows.a + (reg % high) * 8 * depth + reg / high * 4;
    for (int row = 0; row < 8; ++row) {
      const __m128i four = _mm_loadu_si128(reinterpret_cast<const __m128i*>(multiplication.a[reg] + 4 * row));
      _mm_storeu_ps(a + row * depth, _mm_castsi128_ps(_mm_and_si128(four, _mm512_castsi512_si128(kept))));
    }
  }
  for (int reg = 0; reg < multiplication.k / 4; ++reg) {
    const __m512i first = _mm512_loadu_si512(multiplication.b[reg]),
                  second = _mm512_loadu_si512(multiplication.b[reg] + 16);
    for (int h = 0; h < 2; ++h) {
      const __m512i turned = _mm512_permutex2var_epi32(first, _mm512_load_si512(TRANSPOSITION.words[h]), second);
      _mm512_store_ps(rows.b + 32 * reg + 16 * h, _mm512_castsi512_ps(_mm512_and_si512(turned, kept)));
    }
  }
}

// 16 bytes. E5M2 is the upper half of an f16.
inline __m512 widen_fp8(Type type, __m128i bytes) {
  if (type == Type::E5M2) return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8));
  const __m512i wide = _mm512_cvtepu8_epi32(bytes), rest = _mm512_and_si512(wide, _mm512_set1_epi32(127));
  // Moved into place, the exponent is off by a power of two, which the product puts right; subnormals come out normal.
  const __m512 magnitude = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(rest, 20)), _mm512_set1_ps(0x1p120f));
  const __m512i sign = _mm512_slli_epi32(_mm512_sub_epi32(wide, rest), 24);
  const __mmask16 nan = _mm512_cmpeq_epi32_mask(rest, _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(
      _mm512_mask_set1_epi32(_mm512_or_si512(_mm512_castps_si512(magnitude), sign), nan, 0x7fffffff));
}

// [k][n] from a register's [n][k], 16 bytes a row of 8: k from 8 h on, 8 rows of 8 bytes.
inline __m512i turned_bytes(const __m512i (&halves)[2], int h) {
  return _mm512_permutex2var_epi8(halves[0], _mm512_load_si512(TRANSPOSITION.bytes[h]), halves[1]);
}

inline void unpack_fp8(const Multiplication& multiplication, Rows& rows) {
  const int high = multiplication.rows / 8, depth = multiplication.depth;
  for (int reg = 0; reg < high * depth / 16; ++reg) {
    float* const a = rows.a + (reg % high) * 8 * depth + reg / high * 16;
    for (int row = 0; row < 8; ++row) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(multiplication.a[reg] + 4 * row));
      _mm512_storeu_ps(a + row * depth, widen_fp8(multiplication.a_type, bytes));
    }
  }
  for (int reg = 0; reg < multiplication.k / 16; ++reg) {
    const __m512i halves[2] = {_mm512_loadu_si512(multiplication.b[reg]),
                               _mm512_loadu_si512(multiplication.b[reg] + 16)};
    for (int h = 0; h < 2; ++h) {
      const __m512i turned = turned_bytes(halves, h);
      float* const b = rows.b + 128 * reg + 64 * h;
      _mm512_store_ps(b, widen_fp8(multiplication.b_type, _mm512_castsi512_si128(turned)));
      _mm512_store_ps(b + 16, widen_fp8(multiplication.b_type, _mm512_extracti32x4_epi32(turned, 1)));
      _mm512_store_ps(b + 32, widen_fp8(multiplication.b_type, _mm512_extracti32x4_epi32(turned, 2)));
      _mm512_store_ps(b + 48, widen_fp8(multiplication.b_type, _mm512_extracti32x4_epi32(turned, 3)));
    }
  }
}

inline void unpack(const Multiplication& multiplication, Rows& rows) {
  switch (multiplication.a_type) {
    case Type::F16:
      return unpack_halves<true>(multiplication, rows);
    case Type::BF16:
      return unpack_halves<false>(multiplication, rows);
    case Type::TF32:
      return unpack_tf32(multiplication, rows);
    default:
      return unpack_fp8(multiplication, rows);
  }
}

// ---- The chain of fused multiply-adds ----

inline __m256 to_half_and_back(__m256 value) {
  return _mm256_cvtph_ps(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline __m256 canonical(__m256 value) {
  const __mmask8 nan = _mm256_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm256_castsi256_ps(_mm256_mask_set1_epi32(_mm256_castps_si256(value), nan, 0x7fffffff));
}

void chain(const Multiplication& multiplication, float* c) {
  Rows rows;
  unpack(multiplication, rows);
  const int depth = multiplication.depth;
  for (int m = 0; m < multiplication.rows; m += 4) {
    const float* const a = rows.a + m * depth;
    const uint16_t* const source = multiplication.source + m * multiplication.source_stride;
    __m256 sums[4];
    for (int i = 0; i < 4; ++i) sums[i] = _mm256_loadu_ps(c + 8 * (m + i));
    for (int k = 0; k < depth; ++k) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m256 b = _mm256_load_ps(rows.b + source[i * multiplication.source_stride + k]);
        sums[i] = _mm256_fmadd_ps(_mm256_set1_ps(a[i * depth + k]), b, sums[i]);
      }
    }
    for (int i = 0; i < 4; ++i) {
      const __m256 sum = multiplication.half ? to_half_and_back(sums[i]) : sums[i];
      _mm256_storeu_ps(c + 8 * (m + i), canonical(sum));
    }
  }
}

// ---- The exact model ----

constexpr float ABSENT = -10000.0f;  // the exponent of 0: below all that are compared with it, even doubled

// Significands and exponents: value = significand * 2^exponent. Returns false for an infinity or NaN.
inline bool split(const float* values, int count, float smallest, float* significands, float* exponents) {
  const __m512 least = _mm512_set1_ps(smallest), absent = _mm512_set1_ps(ABSENT);
  __mmask16 exceptional = 0;
  for (int i = 0; i < count; i += 16) {
    const __m512 value = _mm512_load_ps(values + i);
    exceptional |= _mm512_fpclass_ps_mask(value, 0x99);  // NaNs and infinities
    const __m512 exponent = _mm512_max_ps(_mm512_getexp_ps(value), least);
    _mm512_store_ps(significands + i, _mm512_scalef_ps(value, _mm512_sub_ps(_mm512_setzero_ps(), exponent)));
    const __mmask16 zero = _mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_EQ_OQ);
    _mm512_store_ps(exponents + i, _mm512_mask_mov_ps(exponent, zero, absent));
  }
  return exceptional == 0;
}

struct Split {
  alignas(64) float a_significand[16 * MAX_FLOAT_DEPTH], a_exponent[16 * MAX_FLOAT_DEPTH];
  alignas(64) float b_significand[8 * MAX_FLOAT_K], b_exponent[8 * MAX_FLOAT_K];
};

// One block of a row of D, of `count` products, a constant where PRODUCTS is not 0. Bits of `trouble` are lanes for
// which the result does not hold.
struct Block {
  const float *a_significand, *a_exponent, *b_significand, *b_exponent;
  const uint16_t* source;
};

// |value| without a branch on the sign bit.
inline __m256 magnitude(__m256 value) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), value); }

template <bool HALF, int PRODUCTS>
[[gnu::always_inline]] inline __m256 add_block(const Block& block, int count, const Model& model, __m256 c,
                                               __mmask8& trouble) {
  const __m256 fraction = _mm256_set1_ps(static_cast<float>(model.fraction));
  const __mmask8 present = _mm256_cmp_ps_mask(c, _mm256_setzero_ps(), _CMP_NEQ_UQ);
  const __m256 c_exponent = _mm256_max_ps(_mm256_getexp_ps(c), _mm256_set1_ps(-126.0f));
  const __m256 floor = _mm256_set1_ps(static_cast<float>(model.floor));
  __m256 top = _mm256_mask_max_ps(floor, present, floor, c_exponent);
  // With a constant number of products, their exponents stay in registers.
  __m256 exponents[PRODUCTS != 0 ? PRODUCTS : 1];
  const auto exponent_of = [&](int k) __attribute__((always_inline)) {
    return _mm256_add_ps(_mm256_load_ps(block.b_exponent + block.source[k]), _mm256_set1_ps(block.a_exponent[k]));
  };
#pragma GCC unroll 16
  for (int k = 0; k < count; ++k) {
    const __m256 exponent = exponent_of(k);
    if constexpr (PRODUCTS != 0) exponents[k] = exponent;
    top = _mm256_max_ps(top, exponent);
  }
  const __m256 scale = _mm256_sub_ps(fraction, top);
  __m256i sum = _mm256_setzero_si256();
#pragma GCC unroll 16
  for (int k = 0; k < count; ++k) {
    __m256 exponent;
    if constexpr (PRODUCTS != 0) {
      exponent = exponents[k];
    } else {
      exponent = exponent_of(k);
    }
    const __m256 product =
        _mm256_mul_ps(_mm256_load_ps(block.b_significand + block.source[k]), _mm256_set1_ps(block.a_significand[k]));
    const __m256 scaled = _mm256_scalef_ps(product, _mm256_add_ps(exponent, scale));
    sum = _mm256_add_epi32(sum, _mm256_cvttps_epi32(scaled));
  }
  const __m256i start = _mm256_cvttps_epi32(_mm256_scalef_ps(c, scale));
  const __m256i total = _mm256_add_epi32(sum, start);
  // The products alone fit (see `fits`); adding c may not: signs alike before, another one after.
  trouble |= _mm256_movepi32_mask(_mm256_andnot_si256(_mm256_xor_si256(sum, start), _mm256_xor_si256(sum, total)));
  const __m512i whole = _mm512_castsi256_si512(total);
  __m256 kept = _mm512_castps512_ps256(_mm512_cvt_roundepi32_ps(whole, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC));
  if constexpr (HALF) {
    // Round to odd, then to f16: the last of 24 bits says whether there was anything below. f16 keeps 11.
    const __mmask8 inexact = _mm256_cmpneq_epi32_mask(_mm256_cvttps_epi32(kept), total);
    kept = _mm256_castsi256_ps(
        _mm256_mask_or_epi32(_mm256_castps_si256(kept), inexact, _mm256_castps_si256(kept), _mm256_set1_epi32(1)));
    const __m256 rounded = to_half_and_back(_mm256_scalef_ps(kept, _mm256_sub_ps(_mm256_setzero_ps(), scale)));
    trouble |= _mm256_fpclass_ps_mask(rounded, 0x99);
    return rounded;
  } else {
    const __m512 scaled = _mm512_scalef_round_ps(_mm512_castps256_ps512(kept),
                                                 _mm512_castps256_ps512(_mm256_sub_ps(_mm256_setzero_ps(), scale)),
                                                 _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
    __m256 result = _mm512_castps512_ps256(scaled);
    // An overflow comes out as the largest finite number here.
    trouble |= _mm256_cmp_ps_mask(magnitude(result), _mm256_set1_ps(0x1.fffffep127f), _CMP_NLT_UQ);
    if (model.significant < 24) {
      const int dropped = 24 - model.significant;
      result = _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(result), _mm256_set1_epi32(-1 << dropped)));
      // Far above the subnormals, of which fewer bits would be kept; zeros are fine.
      const __mmask8 small = _mm256_cmp_ps_mask(magnitude(result), _mm256_set1_ps(0x1p-100f), _CMP_LT_OQ);
      trouble |= _mm256_mask_cmp_ps_mask(small, result, _mm256_setzero_ps(), _CMP_NEQ_UQ) |
                 (small & _mm256_cmpneq_epi32_mask(total, _mm256_setzero_si256()));
    }
    return result;
  }
}

template <bool HALF, int PRODUCTS>
bool in_blocks(const Multiplication& multiplication, const Split& split, float* c) {
  const Model& model = multiplication.model;
  const int depth = multiplication.depth, products = PRODUCTS != 0 ? PRODUCTS : model.products;
  alignas(32) float results[16 * 8];
  __mmask8 trouble = 0;
  for (int m = 0; m < multiplication.rows; ++m) {
    Block block{split.a_significand + m * depth, split.a_exponent + m * depth, split.b_significand, split.b_exponent,
                multiplication.source + m * multiplication.source_stride};
    __m256 sum = _mm256_loadu_ps(c + 8 * m);
    trouble |= _mm256_fpclass_ps_mask(sum, 0x99);
    int first = 0;
    for (; first + products <= depth; first += products) {
      sum = add_block<HALF, PRODUCTS>(block, products, model, sum, trouble);
      block.a_significand += products, block.a_exponent += products, block.source += products;
    }
    if (first < depth) sum = add_block<HALF, 0>(block, depth - first, model, sum, trouble);
    _mm256_store_ps(results + 8 * m, sum);
  }
  if (trouble != 0) return false;
  std::memcpy(c, results, sizeof(float) * 8 * multiplication.rows);
  return true;
}

// Whether the sum of a block's products always fits 32 bits: each is less than 4 in the block's units.
bool fits(const Model& model) { return (int64_t{model.products} << (model.fraction + 2)) <= int64_t{1} << 31; }

template <bool HALF>
bool in_blocks(const Multiplication& multiplication, const Rows& rows, float* c) {
  Split parts;
  const auto smallest = [&](Type type) {
    return static_cast<float>(smallest_exponent(multiplication.model.through_f16 ? Type::F16 : type));
  };
  const bool finite =
      split(rows.a, multiplication.rows * multiplication.depth, smallest(multiplication.a_type), parts.a_significand,
            parts.a_exponent) &
      split(rows.b, 8 * multiplication.k, smallest(multiplication.b_type), parts.b_significand, parts.b_exponent);
  if (!finite) return false;
  switch (multiplication.model.products) {
    case 4:
      return in_blocks<HALF, 4>(multiplication, parts, c);
    case 8:
      return in_blocks<HALF, 8>(multiplication, parts, c);
    case 16:
      return in_blocks<HALF, 16>(multiplication, parts, c);
    default:
      return in_blocks<HALF, 0>(multiplication, parts, c);
  }
}

// fp8 through f16: the elements in the order in which they are summed, from 0, and then c.
template <bool HALF>
bool through_f16(const Multiplication& multiplication, Rows& rows, float* c) {
  const int depth = multiplication.depth;
  Multiplication regrouped = multiplication;
  alignas(64) uint16_t order[32], source[16 * MAX_FLOAT_DEPTH];
  if (depth == 32) {
    for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(summed(multiplication, i));
    const __m512i places = _mm512_load_si512(order);
    const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(places));
    const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(places, 1));
    for (int m = 0; m < multiplication.rows; ++m) {
      float* const row = rows.a + 32 * m;
      const __m512 first = _mm512_load_ps(row), second = _mm512_load_ps(row + 16);
      _mm512_store_ps(row, _mm512_permutex2var_ps(first, low, second));
      _mm512_store_ps(row + 16, _mm512_permutex2var_ps(first, high, second));
      const __m512i from = _mm512_loadu_si512(multiplication.source + m * multiplication.source_stride);
      _mm512_store_si512(source + 32 * m, _mm512_permutexvar_epi16(places, from));
    }
    regrouped.source = source, regrouped.source_stride = 32;
  }
  alignas(64) float sums[16 * 8] = {};
  if (!in_blocks<HALF>(regrouped, rows, sums)) return false;
  for (int m = 0; m < multiplication.rows; ++m) {
    if (_mm256_fpclass_ps_mask(_mm256_loadu_ps(c + 8 * m), 0x99) != 0) return false;
  }
  for (int m = 0; m < multiplication.rows; ++m) {
    // Of two f16 the sum in f32, rounded to f16, is rounded as once: 24 bits are 2 * 11 + 2.
    const __m256 sum = _mm256_add_ps(_mm256_load_ps(sums + 8 * m), _mm256_loadu_ps(c + 8 * m));
    _mm256_storeu_ps(c + 8 * m, canonical(HALF ? to_half_and_back(sum) : sum));
  }
  return true;
}

template <bool HALF>
bool in_blocks(const Multiplication& multiplication, float* c) {
  if (!fits(multiplication.model)) return false;
  Rows rows;
  unpack(multiplication, rows);
  return multiplication.model.through_f16 ? through_f16<HALF>(multiplication, rows, c)
                                          : in_blocks<HALF>(multiplication, rows, c);
}

// ---- Integers ----

// The elements of 16 bytes of 4 bits, low half first, as bytes.
template <bool SIGNED>
inline __m128i signed_nibbles(__m128i nibbles) {
  if constexpr (!SIGNED) return nibbles;
  const __m128i sign = _mm_set1_epi8(8);
  return _mm_sub_epi8(_mm_xor_si128(nibbles, sign), sign);
}

template <bool SIGNED>
inline __m512i widen_bytes(__m128i bytes) {
  return SIGNED ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes);
}

template <bool SIGNED, bool NIBBLES>
void unpack_integer_a(const Multiplication& multiplication, int32_t* values) {
  constexpr int PER_ROW = NIBBLES ? 32 : 16;
  const int high = multiplication.rows / 8, depth = multiplication.depth;
  for (int reg = 0; reg < high * depth / PER_ROW; ++reg) {
    int32_t* a = values + (reg % high) * 8 * depth + reg / high * PER_ROW;
    for (int row = 0; row < 8; ++row, a += depth) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(multiplication.a[reg] + 4 * row));
      if constexpr (NIBBLES) {
        const __m128i mask = _mm_set1_epi8(15), low = signed_nibbles<SIGNED>(_mm_and_si128(bytes, mask));
        const __m128i up = signed_nibbles<SIGNED>(_mm_and_si128(_mm_srli_epi16(bytes, 4), mask));
        _mm512_storeu_si512(a, widen_bytes<SIGNED>(_mm_unpacklo_epi8(low, up)));
        _mm512_storeu_si512(a + 16, widen_bytes<SIGNED>(_mm_unpackhi_epi8(low, up)));
      } else {
        _mm512_storeu_si512(a, widen_bytes<SIGNED>(bytes));
      }
    }
  }
}

// Two rows of B, 8 wide, from 16 bytes.
template <bool SIGNED, bool NIBBLES>
inline void store_rows_of_b(__m128i bytes, int32_t* b) {
  if constexpr (NIBBLES) {
    const __m128i mask = _mm_set1_epi8(15);
    const __m512i low = widen_bytes<SIGNED>(signed_nibbles<SIGNED>(_mm_and_si128(bytes, mask)));
    const __m512i up = widen_bytes<SIGNED>(signed_nibbles<SIGNED>(_mm_and_si128(_mm_srli_epi16(bytes, 4), mask)));
    _mm512_storeu_si512(b, _mm512_inserti32x8(low, _mm512_castsi512_si256(up), 1));
    _mm512_storeu_si512(b + 16, _mm512_inserti32x8(up, _mm512_extracti32x8_epi32(low, 1), 0));
  } else {
    _mm512_storeu_si512(b, widen_bytes<SIGNED>(bytes));
  }
}

template <bool SIGNED, bool NIBBLES>
void unpack_integer_b(const Multiplication& multiplication, int32_t* b) {
  constexpr int PER_ROW = NIBBLES ? 32 : 16, STEP = NIBBLES ? 32 : 16;  // elements of B from 16 turned bytes
  for (int reg = 0; reg < multiplication.k / PER_ROW; ++reg) {
    const __m512i halves[2] = {_mm512_loadu_si512(multiplication.b[reg]),
                               _mm512_loadu_si512(multiplication.b[reg] + 16)};
    for (int h = 0; h < 2; ++h, b += 4 * STEP) {
      const __m512i turned = turned_bytes(halves, h);
      store_rows_of_b<SIGNED, NIBBLES>(_mm512_castsi512_si128(turned), b);
      store_rows_of_b<SIGNED, NIBBLES>(_mm512_extracti32x4_epi32(turned, 1), b + STEP);
      store_rows_of_b<SIGNED, NIBBLES>(_mm512_extracti32x4_epi32(turned, 2), b + 2 * STEP);
      store_rows_of_b<SIGNED, NIBBLES>(_mm512_extracti32x4_epi32(turned, 3), b + 3 * STEP);
    }
  }
}

using UnpackIntegers = void (*)(const Multiplication&, int32_t*);
// By type: S8, U8, S4, U4.
constexpr UnpackIntegers UNPACK_A[4] = {unpack_integer_a<true, false>, unpack_integer_a<false, false>,
                                        unpack_integer_a<true, true>, unpack_integer_a<false, true>};
constexpr UnpackIntegers UNPACK_B[4] = {unpack_integer_b<true, false>, unpack_integer_b<false, false>,
                                        unpack_integer_b<true, true>, unpack_integer_b<false, true>};
int index_of(Type type) { return type == Type::S8 ? 0 : type == Type::U8 ? 1 : type == Type::S4 ? 2 : 3; }

void multiply_integers(const Multiplication& multiplication, int32_t* c) {
  alignas(64) int32_t a_values[16 * MAX_DEPTH], b[8 * MAX_K];
  UNPACK_A[index_of(multiplication.a_type)](multiplication, a_values);
  UNPACK_B[index_of(multiplication.b_type)](multiplication, b);
  const int depth = multiplication.depth;
  for (int m = 0; m < multiplication.rows; m += 4) {
    const int32_t* const a = a_values + m * depth;
    const uint16_t* const source = multiplication.source + m * multiplication.source_stride;
    __m256i sums[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int k = 0; k < depth; ++k) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m256i row =
            _mm256_load_si256(reinterpret_cast<const __m256i*>(b + source[i * multiplication.source_stride + k]));
        sums[i] = _mm256_add_epi32(sums[i], _mm256_mullo_epi32(_mm256_set1_epi32(a[i * depth + k]), row));
      }
    }
    for (int i = 0; i < 4; ++i) {
      alignas(32) int32_t row[8];
      _mm256_store_si256(reinterpret_cast<__m256i*>(row), sums[i]);
      add_sums(multiplication, row, c + 8 * (m + i));
    }
  }
}

}  // namespace

namespace avx512 {

void floats(const Multiplication& multiplication, float* c) {
  const bool whole_registers = multiplication.k >= 8 || multiplication.a_type == Type::TF32;  // not so in f16 m8n8k4
  if (whole_registers) {
    switch (multiplication.model.numerics) {
      case Numerics::IEEE:
        return chain(multiplication, c);
      case Numerics::FLOAT64:
        break;
      default:
        if (multiplication.half ? in_blocks<true>(multiplication, c) : in_blocks<false>(multiplication, c)) return;
    }
  }
  portable::floats(multiplication, c);
}

void integers(const Multiplication& multiplication, int32_t* c) {
  if (multiplication.a_type == Type::B1) return multiply_bits(multiplication, c);
  multiply_integers(multiplication, c);
}

}  // namespace avx512
}  // namespace sparse24::ptx::tensor
