// The tile kernel of linear() in AVX-512, for any dot product (linear_avx512.cpp, linear_avx512_bf16.cpp).
//
// A lane of a vector is one output row of a block of 16. Per step the kernel takes one vector of values and turns codes
// into a vector of indices (`control`); then, for each row of the panel, one permute of a 64-byte unit of x picks the
// partners of the values, and one dot-product instruction adds the products:
//
//   control      (i0 of row 0)  (i0 of row 1)  ...  (i0 of row 15)
//   permuted     x[i0 of row 0] x[i0 of row 1] ...  x[i0 of row 15]        permute(control, unit of x)
//   accumulator  += permuted * (value of row 0) (value of row 1) ...
//
// x is never broadcast or expanded, W never decompressed, and y comes out row-major.
#pragma once
#include <algorithm>

#include "csrc/cpu/linear/linear_kernels.h"
#include "csrc/cpu/linear/vector_avx512.h"

namespace sparse24::cpu {
namespace {

// W is prefetched into the L2, this far ahead of its use; into the L1 it would take the buffers that x needs, and in
// bursts stall them. At one or two rows the hardware's prefetcher alone is faster. So it is for an I8 weight of few
// rows that lies in small pages (all measured on Zen 4).
constexpr int PREFETCH_BYTES = 8192;
constexpr int PREFETCH_MIN_ROWS = 3, PREFETCH_MIN_ROWS_SMALL_I8 = 8;
constexpr int64_t HUGE_PAGE_BYTES = 2 << 20;

template <Element WEIGHT, int ROWS>
SPARSE24_INLINE int64_t prefetch_distance(int64_t packed_bytes) {
  const bool small = WEIGHT == Element::I8 && ROWS < PREFETCH_MIN_ROWS_SMALL_I8 && packed_bytes < HUGE_PAGE_BYTES;
  return small ? 0 : PREFETCH_BYTES;
}

// The vector at `table`. Where accumulators leave no ROOM it is loaded at each use: g++ would keep it in a register
// from before the loop, and spill accumulators instead.
template <bool ROOM>
SPARSE24_INLINE __m512i constant(const void* table) {
  if constexpr (!ROOM) asm volatile("" : "+r"(table));
  return _mm512_load_si512(table);
}

// Sixteen elements of y from index `at` on: v holds floats, or for I32 integers.
SPARSE24_INLINE void store_y(const Epilogue& epilogue, int64_t at, __mmask16 mask, __m512i v, __m512 y_scale) {
  const __m512 floats = _mm512_castsi512_ps(v);
  if (epilogue.y_type == Number::I32) {
    _mm512_mask_storeu_epi32(static_cast<int32_t*>(epilogue.y) + at, mask, v);
  } else if (epilogue.y_type == Number::I8) {
    store_quantized(static_cast<int8_t*>(epilogue.y) + at, mask, floats, y_scale);
  } else {
    store_floats(epilogue.y, element_of(epilogue.y_type), at, mask, floats);
  }
}

// Sixteen tokens of sixteen output features from `column` on, into planes; v is [token] of vectors of features. Only
// the first `count` tokens and `features` features are written. Tokens of an image lie side by side.
SPARSE24_INLINE void store_planes(const Linear& call, int64_t token, int count, int64_t column, int64_t features,
                                  __m512i (&v)[16], __m512 y_scale) {
  transpose_16(v);
  for (int first = 0; first < count;) {
    const int64_t left = call.plane - (token + first) % call.plane;
    const int last = left < count - first ? first + static_cast<int>(left) : count;
    const auto mask = static_cast<__mmask16>(first_lanes(last) & ~first_lanes(first));
    const int64_t at = call.y_index(token + first, column) - first;
    for (int n = 0; n < 16 && n < features; ++n) store_y(call.epilogue, at + n * call.plane, mask, v[n], y_scale);
    first = last;
  }
}

// totals [rows] += sums * scales, of the scale group `group` of a block, which begins at w; the sums are float, or
// int32 as a panel of I8 has them.
template <Element WEIGHT, Element PANEL>
void add_group(const Linear& call, int rows, int64_t block, const uint8_t* w, int64_t group, const __m512i* sums,
               __m512i* totals) {
  const Epilogue& epilogue = call.epilogue;
  const int64_t column = block * BLOCK_ROWS;
  const __m512 scales = _mm512_maskz_loadu_ps(first_lanes(epilogue.out_features - column),
                                              epilogue.scales + group * epilogue.out_features + column);
  __m512i compensation = _mm512_setzero_si512();
  if constexpr (PANEL == Element::I8) {
    const uint8_t* const first = w + chunk_count(WEIGHT, call.in_features) * chunk_bytes(WEIGHT);
    compensation = _mm512_loadu_si512(first + group * COMPENSATION_BYTES);
  }
  const auto sum = [&](int row) SPARSE24_LAMBDA {
    if constexpr (PANEL != Element::I8) return _mm512_castsi512_ps(sums[row]);
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_sub_epi32(sums[row], compensation), sum_shift(WEIGHT)));
  };
  for (int row = 0; row < rows; ++row) {
    const __m512 total = _mm512_add_ps(_mm512_castsi512_ps(totals[row]), _mm512_mul_ps(sum(row), scales));
    totals[row] = _mm512_castps_si512(total);
  }
}

// y of one block and the rows of the tile, from its sums, [rows] of float or of int32, or of scale groups from totals.
// Bias, residual, activation, rounding, store.
template <bool INTEGER, Activation ACTIVATION>
void finish(const Linear& call, const Tile& tile, int64_t block, const __m512i* sums) {
  const Epilogue epilogue = call.epilogue;  // a copy, which the stores to y cannot be taken to change
  const int64_t token = tile.first_token, column = block * BLOCK_ROWS, features = epilogue.out_features - column;
  const int rows = tile.rows;
  const float* const x_scales = tile.x_scales;
  const __mmask16 mask = first_lanes(features);
  const __m512 zero = _mm512_setzero_ps();
  const bool groups = call.group_size != 0, scaled = epilogue.scales && !groups;
  const __m512 scales = scaled ? _mm512_maskz_loadu_ps(mask, epilogue.scales + column) : _mm512_set1_ps(1);
  const __m512 bias = epilogue.bias ? load_floats(epilogue.bias, element_of(epilogue.bias_type), column, mask) : zero;
  const __m512 y_scale = _mm512_set1_ps(epilogue.y_scale ? *epilogue.y_scale : 1);
  __m512i compensation = _mm512_setzero_si512();
  if constexpr (INTEGER) compensation = _mm512_loadu_si512(compensation_of(call, block, 0));
  const __m128i shift = _mm_cvtsi32_si128(sum_shift(call.weight));

  const auto value = [&](int row) SPARSE24_LAMBDA {
    __m512 v;
    if constexpr (INTEGER) {
      const __m512i sum = _mm512_sra_epi32(_mm512_sub_epi32(sums[row], compensation), shift);
      if (epilogue.y_type == Number::I32) return sum;
      v = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(_mm512_set1_ps(x_scales[row]), scales));
    } else {
      v = _mm512_castsi512_ps(sums[row]);
      if (scaled) v = _mm512_mul_ps(v, scales);
      if (groups && x_scales) v = _mm512_mul_ps(v, _mm512_set1_ps(x_scales[row]));
    }
    if (epilogue.bias) v = _mm512_add_ps(v, bias);
    if (epilogue.residual) {
      const int64_t at = (token + row) * epilogue.residual_stride + column;
      v = _mm512_add_ps(v, load_floats(epilogue.residual, element_of(epilogue.residual_type), at, mask));
    }
    return _mm512_castps_si512(activate<ACTIVATION>(v));
  };
  if (call.plane != 0) {
    for (int first = 0; first < rows; first += 16) {
      const int count = rows - first < 16 ? rows - first : 16;
      __m512i v[16] = {};
      for (int row = 0; row < count; ++row) v[row] = value(first + row);
      store_planes(call, token + first, count, column, features, v, y_scale);
    }
    return;
  }
  const auto for_each_row = [&](const auto& store) SPARSE24_LAMBDA {
    for (int row = 0; row < rows; ++row) store((token + row) * epilogue.y_stride + column, value(row));
  };
  // A store with a mask takes five times as long (Zen 4).
  if (mask == 0xffff && epilogue.y_type == Number::F32) {
    for_each_row([&](int64_t at, __m512i v)
                     SPARSE24_LAMBDA { _mm512_storeu_si512(static_cast<float*>(epilogue.y) + at, v); });
  } else if (mask == 0xffff && epilogue.y_type == Number::BF16) {
    for_each_row([&](int64_t at, __m512i v)
                     SPARSE24_LAMBDA { store_floats(epilogue.y, Element::BF16, at, 0xffff, _mm512_castsi512_ps(v)); });
  } else {
    for_each_row([&](int64_t at, __m512i v) SPARSE24_LAMBDA { store_y(epilogue, at, mask, v, y_scale); });
  }
}

using Finish = void (*)(const Linear& call, const Tile& tile, int64_t block, const __m512i* sums);

template <bool INTEGER>
Finish finish_by(Activation activation) {
  switch (activation) {
    case Activation::RELU:
      return finish<INTEGER, Activation::RELU>;
    case Activation::GELU:
      return finish<INTEGER, Activation::GELU>;
    case Activation::GELU_TANH:
      return finish<INTEGER, Activation::GELU_TANH>;
    case Activation::SILU:
      return finish<INTEGER, Activation::SILU>;
    default:
      return finish<INTEGER, Activation::NONE>;
  }
}

// The epilogue of a call whose panels are of I8, or of floats.
template <bool INTEGER>
Finish finish_for(const Linear& call) {
  return call.group_size ? finish_by<false>(call.epilogue.activation) : finish_by<INTEGER>(call.epilogue.activation);
}

// y of a block comes into the cache while its sums are made: its rows are far apart and no prefetcher sees them coming.
SPARSE24_INLINE void prefetch_y(const Linear& call, const Tile& tile, int64_t block, int rows) {
  const Epilogue& epilogue = call.epilogue;
  if (call.plane != 0) return;
  const int y_bytes = epilogue.y_type == Number::I32 ? 4 : element_bits(element_of(epilogue.y_type)) / 8;
  const auto y = static_cast<const uint8_t*>(epilogue.y);
  for (int row = 0; row < rows; ++row) {
    __builtin_prefetch(y + ((tile.first_token + row) * epilogue.y_stride + block * BLOCK_ROWS) * y_bytes, 1);
  }
}

// What is unrolled: a chunk, or one of its two halves, which are alike: codes PART_CODES bytes on, and half of the
// values.
struct Part {
  const uint8_t *begin, *codes, *values, *next_codes;
};

// Dot gives the element types WEIGHT and PANEL, how many PARTS a chunk has and how many vectors of values a part
// (STEPS), how many of those meet one unit of x (UNIT_STEPS), and how to read codes and values, to multiply and to sum.
// Registers are __m512i throughout, whether their lanes are floats or integers.
template <class Dot, int ROWS>
void multiply_rows(const Linear& call, const Tile& tile) {
  constexpr int CHUNK_BYTES = chunk_bytes(Dot::WEIGHT), LINES = (CHUNK_BYTES / 64 + Dot::PARTS - 1) / Dot::PARTS;
  constexpr int CODES = chunk_codes_bytes(Dot::WEIGHT), VALUES = CHUNK_BYTES - CODES;
  constexpr int COLUMNS = chunk_columns(Dot::WEIGHT);
  constexpr int PART_X_BYTES = Dot::STEPS / Dot::UNIT_STEPS * ROWS * UNIT_BYTES;
  // Independent sums per output, where rows alone are too few to hide the latency of the dot product.
  constexpr int SUMS = ROWS <= 4 ? 4 : ROWS <= 8 ? 2 : 1;
  constexpr bool ROOM = ROWS * SUMS <= 16;
  const int64_t chunks = chunk_count(Dot::WEIGHT, call.in_features), shared = group_chunks(call);
  const int64_t bytes = block_bytes(call);
  const int64_t ahead = prefetch_distance<Dot::WEIGHT, ROWS>(block_count(call.epilogue.out_features) * bytes);
  // Of the last chunk, the second half may be filling alone.
  const bool half = (call.in_features + COLUMNS / 2 - 1) / (COLUMNS / 2) % 2 == 1;
  const Finish finish = finish_for<Dot::PANEL == Element::I8>(call);

  for (int64_t block = tile.first_block; block < tile.last_block; ++block) {
    const uint8_t* w = call.packed + block * bytes;
    const uint8_t* x = tile.panel;
    prefetch_y(call, tile, block, ROWS);

    __m512i results[ROWS], totals[ROWS] = {};
    __m512i control = Dot::template control<ROOM>(w, 0);
    for (int64_t begin = 0, group = 0;; begin += shared, ++group) {
      const int64_t end = std::min(begin + shared, chunks);
      const bool is_last = end == chunks, cut = is_last && half;
      __m512i sums[ROWS][SUMS] = {};
      const auto multiply_step = [&](int step, const Part& part) SPARSE24_LAMBDA {
        if constexpr (ROWS >= PREFETCH_MIN_ROWS) {
          for (int line = LINES * step / Dot::STEPS; line < LINES * (step + 1) / Dot::STEPS; ++line) {
            __builtin_prefetch(part.begin + ahead + 64 * line, 0, 2);
          }
        }
        // One step ahead, and kept there: otherwise the FP scheduler fills with permutes that wait for their control.
        __m512i next = step + 1 < Dot::STEPS ? Dot::template control<ROOM>(part.codes, step + 1)
                                             : Dot::template control<ROOM>(part.next_codes, 0);
        asm volatile("" : "+v"(next));
        const __m512i values = Dot::template values<ROOM>(part.values, step);
#pragma GCC unroll 32
        for (int row = 0; row < ROWS; ++row) {
          Dot::add(sums[row][step % SUMS], control, x + (step / Dot::UNIT_STEPS * ROWS + row) * UNIT_BYTES, values);
        }
        control = next;
      };
      if constexpr (Dot::PARTS == 1) {
        for (int64_t chunk = begin + cut; chunk < end; ++chunk, w += CHUNK_BYTES) {
          const Part whole{w, w, w + CODES, w + CHUNK_BYTES};
#pragma GCC unroll 32
          for (int step = 0; step < Dot::STEPS; ++step) multiply_step(step, whole);
          x += PART_X_BYTES;
        }
        if (cut) {
          const Part whole{w, w, w + CODES, w + CHUNK_BYTES};
#pragma GCC unroll 32
          for (int step = 0; step < Dot::STEPS / 2; ++step) multiply_step(step, whole);
        }
      } else {
        for (int64_t half_chunk = 2 * begin; half_chunk < 2 * end - cut; ++half_chunk) {
          const int second = half_chunk % 2;
          const Part part{w + second * LINES * 64, w + second * Dot::PART_CODES, w + CODES + second * VALUES / 2,
                          second ? w + CHUNK_BYTES : w + Dot::PART_CODES};
#pragma GCC unroll 32
          for (int step = 0; step < Dot::STEPS; ++step) multiply_step(step, part);
          x += PART_X_BYTES;
          if (second) w += CHUNK_BYTES;
        }
      }
#pragma GCC unroll 32
      for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 4
        for (int i = 1; i < SUMS; ++i) sums[row][0] = Dot::sum(sums[row][0], sums[row][i]);
        results[row] = sums[row][0];
      }
      if constexpr (is_integer(Dot::WEIGHT)) {
        const uint8_t* const whole = call.packed + block * bytes;
        if (call.group_size) add_group<Dot::WEIGHT, Dot::PANEL>(call, ROWS, block, whole, group, results, totals);
      }
      if (is_last) break;
    }
    finish(call, tile, block, is_integer(Dot::WEIGHT) && call.group_size ? totals : results);
  }
}

// What makes floats of integers of WIDTH bits that lie at bit AT of each lane, in two cheap instructions: (lane & mask)
// ^ bits is the float offset + integer, whose significand has a one where the integer has. From shifts and vcvtdq2ps
// they would take three, on the pipes that permute (Zen 4).
template <int WIDTH, int AT>
struct FloatOf {
  static_assert(AT + WIDTH <= 23, "the integer must lie in the significand of a float");
  uint32_t mask[16], bits[16];
  float offset[16];
  constexpr FloatOf() : mask(), bits(), offset() {
    for (int i = 0; i < 16; ++i) {
      mask[i] = ((1u << WIDTH) - 1) << AT;
      bits[i] = static_cast<uint32_t>(127 + 23 - AT) << 23 | 1u << (AT + WIDTH - 1);  // the sign bit is turned
      offset[i] = static_cast<float>((1 << (23 - AT)) + (1 << (WIDTH - 1)));
    }
  }
};
template <int WIDTH, int AT>
alignas(64) constexpr FloatOf<WIDTH, AT> FLOAT_OF;

template <bool ROOM, int WIDTH, int AT>
SPARSE24_INLINE __m512 float_of(__m512i lanes) {
  const FloatOf<WIDTH, AT>& table = FLOAT_OF<WIDTH, AT>;
  const __m512i sum = _mm512_ternarylogic_epi32(lanes, constant<ROOM>(table.mask), constant<ROOM>(table.bits),
                                                0x6A);  // (lanes & mask) ^ bits
  return _mm512_sub_ps(_mm512_castsi512_ps(sum), _mm512_castsi512_ps(constant<ROOM>(table.offset)));
}

// Byte `byte` of each lane, a two's complement number, as float.
template <bool ROOM>
SPARSE24_INLINE __m512 float_of_byte(__m512i lanes, int byte) {
  const __m512i low = byte < 2 ? lanes : _mm512_srli_epi32(lanes, 16);
  return byte % 2 == 0 ? float_of<ROOM, 8, 0>(low) : float_of<ROOM, 8, 8>(low);
}

// Bytes `byte` and `byte` + 1 of each lane, the same, as a pair of bfloat16, which are the high halves of the floats.
template <bool ROOM>
SPARSE24_INLINE __m512i bf16_of_bytes(__m512i lanes, int byte) {
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(float_of_byte<ROOM>(lanes, byte)), 16);
  const __m512i high = _mm512_castps_si512(float_of_byte<ROOM>(lanes, byte + 1));
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  return _mm512_ternarylogic_epi32(mask, high, low, 0xCA);  // mask ? high : low
}

// How a dot product of floats multiplies and sums: one column a lane.
struct FloatProducts {
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

// As floats; for BF16 weights rounded to bfloat16, as every instruction set does.
template <bool ROUND_TO_BF16>
void pack_floats(const Strip& strip) {
  const Element element = strip.x_element;
  const int64_t unit_stride = strip.panel_rows * UNIT_BYTES;
  for (int row = 0; row < strip.count; ++row) {
    const void* const x = strip.rows[row];
    uint8_t* unit = strip.panel + (strip.row + row) * UNIT_BYTES;
    for_each_16(strip.in_features, strip.columns, [&](int64_t k, __mmask16 mask) SPARSE24_LAMBDA {
      __m512 v = load_floats(x, element, k, mask);
      if (ROUND_TO_BF16) v = _mm512_castsi512_ps(round_to_bf16(v));
      _mm512_store_ps(unit, v);
      unit += unit_stride;
    });
  }
}

using Multiply = void (*)(const Linear& call, const Tile& tile);

template <class Dot, int... ROWS>
struct MultiplyTable {
  static constexpr Multiply BY_ROWS[] = {multiply_rows<Dot, ROWS>...};
};
template <class Dot>
void multiply(const Linear& call, const Tile& tile) {
  using Table = MultiplyTable<Dot, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23,
                              24, 25, 26, 27, 28>;
  static_assert(sizeof(Table::BY_ROWS) == PANEL_ROWS * sizeof(Multiply), "one kernel for every height of a panel");
  Table::BY_ROWS[tile.rows - 1](call, tile);  // panel_rows are the same
}

// The kernels of a dot product, with the `pack` that fills its panels.
template <class Dot>
constexpr Kernels kernels_of(void (*pack)(const Strip&)) {
  return {"perm", Dot::PANEL, PANEL_ROWS, 1, pack, multiply<Dot>};
}

}  // namespace
}  // namespace sparse24::cpu
