// The packed form of a 2:4 weight on the device: the order in which mma.sp wants it in registers, so that one 16-byte
// load a lane, from global or from shared memory, is a whole A fragment.
//
// W [N, K] is cut into blocks of 16 rows by two steps of K; a step is what one full-K mma.sp consumes: 32 columns of 16
// bits, 64 columns of 8 bits. Blocks lie in the order [steps / 2][N / 16], all rows of a stretch of K beside each
// other, so that a tile of any height is one contiguous copy. N is padded to a multiple of 64 and K to whole blocks:
// values +0, codes FILLER (0 would not be legal).
//
//   a block       1024 bytes of values, then the metadata: 128 bytes (16-bit weights) or 256 (8-bit)
//   values        byte 512 * step + 16 * lane + 4 * i + b is byte b of register i of that lane's A fragment
//   metadata      16 bits: word `lane` serves both steps (selector 0 reads lanes 0, 1 of a quad, selector 1 lanes 2, 3)
//                 8 bits: word 32 * step + lane
//
// Source: PTX ISA, "Matrix Fragments for sparse mma.m16n8k32 / m16n8k64"; lanes g = lane / 4, t = lane % 4.
#pragma once
#include "format.cuh"

namespace sparse24::packed {

constexpr int BLOCK_ROWS = 16;        // of an mma.sp
constexpr int ROW_PADDING = 64;       // the height of every tile is a multiple of it
constexpr int STEPS = 2;              // of K in a block
constexpr int STEP_VALUE_BYTES = 32;  // of one row of the compressed matrix in one step
constexpr int VALUE_BYTES = STEPS * BLOCK_ROWS * STEP_VALUE_BYTES;
constexpr int FILLER = 0x4;  // the code (0, 1)

// `bits` of an element of W: 16 or 8.
SPARSE24_INLINE constexpr int step_columns(int bits) { return 512 / bits; }
SPARSE24_INLINE constexpr int block_columns(int bits) { return STEPS * step_columns(bits); }
SPARSE24_INLINE constexpr int meta_bytes(int bits) { return BLOCK_ROWS * block_columns(bits) / 8; }
SPARSE24_INLINE constexpr int block_bytes(int bits) { return VALUE_BYTES + meta_bytes(bits); }

SPARSE24_INLINE constexpr int64_t row_blocks(int64_t out_features) {
  return (out_features + ROW_PADDING - 1) / ROW_PADDING * (ROW_PADDING / BLOCK_ROWS);
}
SPARSE24_INLINE constexpr int64_t column_blocks(int bits, int64_t in_features) {
  return (in_features + block_columns(bits) - 1) / block_columns(bits);
}
SPARSE24_INLINE constexpr int64_t bytes(int bits, int64_t out_features, int64_t in_features) {
  return row_blocks(out_features) * column_blocks(bits, in_features) * block_bytes(bits);
}

// ---- Within a block: where each word of it comes from ----
//
// A block is VALUE_BYTES / 4 words of values, then meta_bytes / 4 words of metadata. `column` counts bytes of the
// compressed row within the block, 64 of them; canonical metadata has meta_bytes / 16 bytes a row in a block.

struct Place {
  int row;     // of the 16
  int column;  // bytes
};

// Word `word` of the values: four bytes of one row.
SPARSE24_INLINE constexpr Place value_word(int word) {
  const int step = word / 128, lane = word / 4 % 32, i = word % 4;
  return {lane / 4 + 8 * (i & 1), STEP_VALUE_BYTES * step + 16 * (i >> 1) + 4 * (lane % 4)};
}

// Half `half` of word `word` of 16-bit metadata: two bytes of one canonical row.
SPARSE24_INLINE constexpr Place meta_half_word(int word, int half) { return {word / 4 + 8 * half, 2 * (word % 4)}; }

// Word `word` of 8-bit metadata: four bytes of one canonical row.
SPARSE24_INLINE constexpr Place meta_word(int word) {
  const int lane = word % 32, step = word / 32, t = lane % 4;
  return {lane / 4 + 8 * (t & 1), 8 * step + 4 * (t >> 1)};
}

}  // namespace sparse24::packed
