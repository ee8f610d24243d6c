// What linear.cpp and its kernels agree on: the packed form of W, the panels of x, and a table of functions an ISA.
#pragma once
#include <cstdint>

#include "csrc/cpu/linear/linear.h"

namespace sparse24::cpu {

// ---- The packed form ----
//
// W [N, K] is cut into blocks of 16 rows, a block into chunks of 32 columns (64 of integers); zeros fill both ends.
//
//   packed  block 0, block 1, ..., 64 zero bytes: kernels load codes one chunk ahead of their use
//   block   chunk 0, chunk 1, ..., and for I8 and I4, for each scale group, int32[16]: the compensation of each row
//           (modulo 2^32)
//   chunk   codes, values
//   codes   for each eight groups (32 columns, I4: 64) uint32[16]: group g of a row's eight in bits 4g to 4g + 3
//   values  [slots of the chunk / LANE][16 rows][LANE], LANE = 1 (F32, F16), 2 (BF16) or 4 (I8): a 64-byte vector (32
//           for F16) is what 16 lanes of multiply-add, vdpbf16ps or vpdpbusd take at once.
//           int4: [4][16 rows][4 bytes]: byte i of vector j holds slot i of quads 2j (low half) and 2j + 1 (high half),
//           a quad being the four slots of a group of I4, of two groups of I4_TWO_FOUR
//
// So a kernel reads W as one stream of 2.125 (F32), 1.125 (F16, BF16), 0.625 (I8), 0.375 (I4_TWO_FOUR) or 0.3125 (I4)
// bytes a dense element.

constexpr int BLOCK_ROWS = 16;
constexpr int CODES_BYTES = 64;
constexpr int PACKED_TAIL_BYTES = 64;
constexpr int COMPENSATION_BYTES = 64;

SPARSE24_INLINE constexpr int chunk_columns(Element weight) { return is_integer(weight) ? 64 : 32; }
SPARSE24_INLINE constexpr int lane_values(Element weight) {
  return is_integer(weight) ? 4 : weight == Element::BF16 ? 2 : 1;
}
SPARSE24_INLINE constexpr int chunk_codes_bytes(Element weight) {
  return chunk_columns(weight) / group_columns(pattern_of(weight)) / 8 * CODES_BYTES;
}
SPARSE24_INLINE constexpr int chunk_bytes(Element weight) {
  return chunk_codes_bytes(weight) + BLOCK_ROWS * chunk_columns(weight) / 2 * element_bits(weight) / 8;
}
SPARSE24_INLINE constexpr int64_t chunk_count(Element weight, int64_t in_features) {
  return (in_features + chunk_columns(weight) - 1) / chunk_columns(weight);
}
SPARSE24_INLINE constexpr int64_t block_count(int64_t out_features) {
  return (out_features + BLOCK_ROWS - 1) / BLOCK_ROWS;
}
// Whether x may be rounded to int8 for such a weight.
SPARSE24_INLINE constexpr bool is_compensated(Element weight) { return weight == Element::I8 || weight == Element::I4; }
SPARSE24_INLINE constexpr int64_t block_bytes(Element weight, int64_t in_features, int64_t group_size) {
  const int64_t compensations = is_compensated(weight) ? scale_groups(in_features, group_size) : 0;
  return chunk_count(weight, in_features) * chunk_bytes(weight) + compensations * COMPENSATION_BYTES;
}
SPARSE24_INLINE int64_t block_bytes(const Linear& call) {
  return block_bytes(call.weight, call.in_features, call.group_size);
}

// What an I8 panel's sums have too much: its columns are q + 128, and an I4 value w is multiplied as 16 w, which one
// shift or mask makes of a nibble. (sum - compensation) >> SUM_SHIFT is the sum of q w.
SPARSE24_INLINE constexpr int sum_shift(Element weight) { return weight == Element::I4 ? 4 : 0; }
SPARSE24_INLINE constexpr uint32_t compensation_factor(Element weight) { return 128u << sum_shift(weight); }
SPARSE24_INLINE const uint8_t* compensation_of(const Linear& call, int64_t block, int64_t group) {
  const int64_t chunks = chunk_count(call.weight, call.in_features);
  return call.packed + block * block_bytes(call) + chunks * chunk_bytes(call.weight) + group * COMPENSATION_BYTES;
}

// The chunks of an integer weight that share scales.
SPARSE24_INLINE int64_t group_chunks(const Linear& call) {
  return call.group_size ? call.group_size / chunk_columns(call.weight) : chunk_count(call.weight, call.in_features);
}
static_assert(GROUP_QUANTUM == chunk_columns(Element::I8) && GROUP_QUANTUM == chunk_columns(Element::I4));

// ---- Panels of x ----
//
// A panel holds the columns of some rows of x, as its kernels want them, zero-filled up to whole chunks: of float, of
// bfloat16, or of uint8, which is q ^ 0x80 = q + 128, as vpdpbusd wants it. It has a whole number of strips: of one
// row, or for the gather kernels of 16.
//
//   gather  [column][row], rows filled up to whole strips
//   others  [unit][row][64 bytes]; a unit is 16 columns of float, 32 of bfloat16 or 64 of uint8: one full-width permute
//           of a unit reaches any column of it, whichever the code

constexpr int UNIT_BYTES = 64;
constexpr int PACK_ROWS = 16;   // at most, packed at a time
constexpr int PANEL_ROWS = 28;  // accumulators; with two control words, the values and the permuted x: 32 registers

// Some columns of some rows of x on their way into a panel.
struct Strip {
  const void* const* rows;  // [count], at the first of the columns
  int count;                // of a strip of 16 rows fewer at the end of x
  Element x_element;
  int64_t in_features;  // columns of x
  int64_t columns;      // of the panel: in_features filled up to whole chunks
  uint8_t* panel;       // at the first of the columns
  int panel_rows;       // of this panel: its strips times strip_rows
  int row;              // of the panel, where the strip goes
  float* scales;        // [count], what quantised each row; written by kernels that quantise a float x
};

// A run of blocks of W against one panel.
struct Tile {
  const uint8_t* panel;
  const float* x_scales;  // [rows], or null where x is not quantised
  int64_t first_token;
  int rows;        // tokens
  int panel_rows;  // rows with what fills the last strip
  int64_t first_block, last_block;
};

struct Kernels {
  const char* name;
  Element panel_element;  // F32, BF16 or I8
  int panel_rows;         // at most; a multiple of strip_rows
  int strip_rows;
  void (*pack)(const Strip& strip);
  void (*multiply)(const Linear& call, const Tile& tile);  // y of the tile, epilogue included
  int64_t run_blocks = 1;                                  // of W that multiply() wants at a time
};

// The kernels of an instruction set, for W and x of these element types; null where it has none.
const Kernels* portable_kernels(Element weight, bool weight_only, Element x_element);  // never null
const Kernels* avx2_kernels(Element weight, bool weight_only, Element x_element);
const Kernels* avx512_kernels(Element weight, bool weight_only, Element x_element);
const Kernels* avx512_weight_only_kernels(Element weight);  // of integers
const Kernels* avx512_bf16_kernels(Element weight, bool weight_only, Element x_element);
const Kernels* avx512_gather_kernels(Element weight, bool weight_only, Element x_element);
const Kernels* amx_kernels(Element weight, bool weight_only, Element x_element);
const Kernels* neon_kernels(Element weight, bool weight_only, Element x_element);

// The epilogue of one block in plain C++, for kernels that have no faster one. `sums` is [tile.rows][16] of float, or
// of int32 without compensation and shift for I8 panels; with scale groups it is their totals, float for any panel.
void portable_finish(const Linear& call, const Tile& tile, int64_t block, const float* sums);
void portable_finish(const Linear& call, const Tile& tile, int64_t block, const int32_t* sums);

// totals [rows][16] += sums * scales, of one block and the scale group `group`; the sums as above.
void portable_add_group(const Linear& call, int rows, int64_t block, int64_t group, const float* sums, float* totals);
void portable_add_group(const Linear& call, int rows, int64_t block, int64_t group, const int32_t* sums, float* totals);

// The type of an element of y, bias or residual that is not I32.
SPARSE24_INLINE constexpr Element element_of(Number number) {
  return number == Number::F32    ? Element::F32
         : number == Number::F16  ? Element::F16
         : number == Number::BF16 ? Element::BF16
                                  : Element::I8;
}

}  // namespace sparse24::cpu
