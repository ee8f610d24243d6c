// What linear.cpp and its kernels agree on: the packed form of W, the panels of x, and a table of functions an ISA.
#pragma once
#include <cstdint>

#include "csrc/cpu/linear.h"

namespace sparse24::cpu {

// ---- The packed form ----
//
// W [N, K] is cut into blocks of 16 rows, a block into chunks of 32 columns (64 for I8); zeros fill both ends.
//
//   packed  block 0, block 1, ..., 64 zero bytes: kernels load codes one chunk ahead of their use
//   block   chunk 0, chunk 1, ..., and for I8 int32[16]: 128 * the sum of each row's values (modulo 2^32)
//   chunk   codes, values
//   codes   for each 32 columns uint32[16]: group g of a row's eight in bits 4g to 4g + 3
//   values  [slots of the chunk / LANE][16 rows][LANE], LANE = 1 (F32, F16), 2 (BF16) or 4 (I8): a 64-byte vector (32
//   for
//           F16) is what 16 lanes of multiply-add, vdpbf16ps or vpdpbusd take at once
//
// So a kernel reads W as one stream of 2.125 (F32), 1.125 (F16, BF16) or 0.625 (I8) bytes a dense element.

constexpr int BLOCK_ROWS = 16;
constexpr int CODES_BYTES = 64;
constexpr int PACKED_TAIL_BYTES = 64;
constexpr int COMPENSATION_BYTES = 64;

SPARSE24_INLINE constexpr int chunk_columns(Element element) { return element == Element::I8 ? 64 : 32; }
SPARSE24_INLINE constexpr int lane_values(Element element) {
  return element == Element::I8 ? 4 : element == Element::BF16 ? 2 : 1;
}
SPARSE24_INLINE constexpr int chunk_codes_bytes(Element element) { return chunk_columns(element) / 32 * CODES_BYTES; }
SPARSE24_INLINE constexpr int chunk_bytes(Element element) {
  return chunk_codes_bytes(element) + BLOCK_ROWS * chunk_columns(element) / 2 * element_bits(element) / 8;
}
SPARSE24_INLINE constexpr int64_t chunk_count(Element element, int64_t in_features) {
  return (in_features + chunk_columns(element) - 1) / chunk_columns(element);
}
SPARSE24_INLINE constexpr int64_t block_count(int64_t out_features) {
  return (out_features + BLOCK_ROWS - 1) / BLOCK_ROWS;
}
SPARSE24_INLINE constexpr int64_t block_bytes(Element element, int64_t in_features) {
  return chunk_count(element, in_features) * chunk_bytes(element) + (element == Element::I8 ? COMPENSATION_BYTES : 0);
}

// ---- Panels of x ----
//
// A panel holds up to 28 rows of x as [unit][row][64 bytes]: a unit is 16 columns of float, 32 of bfloat16, or 64 of
// uint8, zero-filled up to whole chunks. One full-width permute of a unit reaches any column of it, whichever the code.
// The uint8 is q ^ 0x80 = q + 128, as vpdpbusd wants it; the compensation takes 128 * sum(w) off again.

constexpr int UNIT_BYTES = 64;
constexpr int PANEL_ROWS = 28;  // accumulators; with two control words, the values and the permuted x: 32 registers

// A run of blocks of W against one panel.
struct Tile {
  const uint8_t* panel;
  const float* token_scales;  // [rows], I8 only
  int64_t first_token;
  int rows;
  int64_t first_block, last_block;
};

SPARSE24_INLINE const void* row_of_x(const Linear& call, int64_t token) {
  return static_cast<const uint8_t*>(call.x) + token * call.x_stride * (element_bits(call.x_element) / 8);
}

struct Kernels {
  Element panel_element;  // F32, BF16 or I8

  // Writes one row of x, at `unit` and every unit_stride bytes; *scale is set for I8 alone.
  void (*pack_row)(const Linear& call, int64_t token, uint8_t* unit, int64_t unit_stride, float* scale);

  // y = activation(x W^T + bias) for the tile.
  void (*multiply)(const Linear& call, const Tile& tile);
};

const Kernels& portable_kernels(Element weight_element);
const Kernels& avx512_kernels(Element weight_element);
const Kernels& avx512_bf16_kernels();  // BF16 weights

}  // namespace sparse24::cpu
