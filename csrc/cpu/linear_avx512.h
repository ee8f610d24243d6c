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
#include "csrc/cpu/linear_kernels.h"
#include "csrc/cpu/vector_avx512.h"

namespace sparse24::cpu {
namespace {

// How far ahead of its use W is prefetched. At one or two rows the hardware's prefetcher alone is faster (Zen 4).
constexpr int PREFETCH_BYTES = 3072;
constexpr int PREFETCH_MIN_ROWS = 3;

// The vector at `table`. Where accumulators leave no ROOM it is loaded at each use: g++ would keep it in a register
// from before the loop, and spill accumulators instead.
template <bool ROOM>
SPARSE24_INLINE __m512i constant(const void* table) {
  if constexpr (!ROOM) asm volatile("" : "+r"(table));
  return _mm512_load_si512(table);
}

// Where one block's part of a tile lies in y.
struct Output {
  uint8_t* first;
  int64_t row_bytes;

  SPARSE24_INLINE Output(const Linear& call, const Tile& tile, int64_t block) {
    const int element_bytes = element_bits(call.x_element) / 8;
    row_bytes = call.y_stride * element_bytes;
    first = static_cast<uint8_t*>(call.y) + tile.first_token * row_bytes + block * BLOCK_ROWS * element_bytes;
  }
};

// y = activation(result + bias) for one block: bias, activation, rounding, masked store. `results` is [rows], of float
// or, for I8, of int32 that still hold the products with x's offset of 128.
template <Element WEIGHT, Activation ACTIVATION>
void finish(const Linear& call, const Tile& tile, int64_t block, Output output, const uint8_t* compensation,
            const __m512i* results) {
  const int64_t column = block * BLOCK_ROWS;
  const __mmask16 mask = first_lanes(call.out_features - column);
  const bool has_bias = call.bias != nullptr;
  const __m512 bias = has_bias ? load_floats(call.bias, call.bias_element, column, mask) : _mm512_setzero_ps();
  const __m512 scales = WEIGHT == Element::I8 ? _mm512_maskz_loadu_ps(mask, call.scales + column) : _mm512_setzero_ps();
  const __m512i offset = WEIGHT == Element::I8 ? _mm512_loadu_si512(compensation) : _mm512_setzero_si512();
  // Copies, which the stores to y cannot be taken to change.
  const Element y_element = call.x_element;
  const float* const token_scales = tile.token_scales;
  const int rows = tile.rows;
  for (int row = 0; row < rows; ++row) {
    __m512 v = _mm512_castsi512_ps(results[row]);
    if constexpr (WEIGHT == Element::I8) {
      const __m512 dot = _mm512_cvtepi32_ps(_mm512_sub_epi32(results[row], offset));
      v = _mm512_mul_ps(dot, _mm512_mul_ps(scales, _mm512_set1_ps(token_scales[row])));
    }
    if (has_bias) v = _mm512_add_ps(v, bias);
    store_floats(output.first + row * output.row_bytes, y_element, 0, mask, activate<ACTIVATION>(v));
  }
}

template <Element WEIGHT>
auto finish_for(Activation activation) {
  switch (activation) {
    case Activation::RELU:
      return finish<WEIGHT, Activation::RELU>;
    case Activation::GELU:
      return finish<WEIGHT, Activation::GELU>;
    case Activation::GELU_TANH:
      return finish<WEIGHT, Activation::GELU_TANH>;
    case Activation::SILU:
      return finish<WEIGHT, Activation::SILU>;
    default:
      return finish<WEIGHT, Activation::NONE>;
  }
}

// Dot gives the weights' element type WEIGHT, how many vectors of values a chunk has (STEPS), how many of those meet
// one unit of x (UNIT_STEPS), and how to read codes and values, to multiply and to sum. Registers are __m512i
// throughout, whether their lanes are floats or integers.
template <class Dot, int ROWS>
void multiply_rows(const Linear& call, const Tile& tile) {
  constexpr int CHUNK_BYTES = chunk_bytes(Dot::WEIGHT);
  // Independent sums per output, where rows alone are too few to hide the latency of the dot product.
  constexpr int SUMS = ROWS <= 4 ? 4 : ROWS <= 8 ? 2 : 1;
  constexpr bool ROOM = ROWS * SUMS <= 16;
  const int64_t chunks = chunk_count(Dot::WEIGHT, call.in_features);
  const int64_t bytes = block_bytes(Dot::WEIGHT, call.in_features);
  const auto finish = finish_for<Dot::WEIGHT>(call.activation);

  for (int64_t block = tile.first_block; block < tile.last_block; ++block) {
    const uint8_t* w = call.packed + block * bytes;
    const uint8_t* x = tile.panel;
    const Output output(call, tile, block);
    // y comes into the cache while the sums are made: its rows are far apart and no prefetcher sees them coming.
    for (int row = 0; row < ROWS; ++row) __builtin_prefetch(output.first + row * output.row_bytes, 1);

    __m512i sums[ROWS][SUMS] = {};
    __m512i control = Dot::template control<ROOM>(w, 0);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      if constexpr (ROWS >= PREFETCH_MIN_ROWS) {
#pragma GCC unroll 32
        for (int line = 0; line < CHUNK_BYTES; line += 64) __builtin_prefetch(w + PREFETCH_BYTES + line);
      }
#pragma GCC unroll 32
      for (int step = 0; step < Dot::STEPS; ++step) {
        // One step ahead, and kept there: otherwise the FP scheduler fills with permutes that wait for their control.
        __m512i next = step + 1 < Dot::STEPS ? Dot::template control<ROOM>(w, step + 1)
                                             : Dot::template control<ROOM>(w + CHUNK_BYTES, 0);
        asm volatile("" : "+v"(next));
        const __m512i values = Dot::values(w, step);
#pragma GCC unroll 32
        for (int row = 0; row < ROWS; ++row) {
          Dot::add(sums[row][step % SUMS], control, x + (step / Dot::UNIT_STEPS * ROWS + row) * UNIT_BYTES, values);
        }
        control = next;
      }
      w += CHUNK_BYTES;
      x += Dot::STEPS / Dot::UNIT_STEPS * ROWS * UNIT_BYTES;
    }
    __m512i results[ROWS];
#pragma GCC unroll 32
    for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 4
      for (int i = 1; i < SUMS; ++i) sums[row][0] = Dot::sum(sums[row][0], sums[row][i]);
      results[row] = sums[row][0];
    }
    finish(call, tile, block, output, w, results);
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
  Table::BY_ROWS[tile.rows - 1](call, tile);
}

}  // namespace
}  // namespace sparse24::cpu
