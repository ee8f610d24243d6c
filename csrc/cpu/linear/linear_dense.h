// What a dense product needs besides the product itself, which csrc/ops_dense.cpp leaves to torch: x made ready for it,
// W decompressed some rows at a time, and the epilogue.
#pragma once
#include "csrc/cpu/linear/linear_kernels.h"

namespace sparse24::cpu {

// Rows [16 * block, 16 * block + 16) of W, all columns of its chunks, to rows[16][stride]; zeros beyond W.
struct DenseDecode {
  void (*floats)(const Linear& call, int64_t block, float* rows, int64_t stride);   // of any W
  void (*bf16)(const Linear& call, int64_t block, uint16_t* rows, int64_t stride);  // of a BF16 W
  void (*int8)(const Linear& call, int64_t block, int8_t* rows, int64_t stride);    // of an I8 or I4 W
};
const DenseDecode& dense_decode();  // of the active ISA
extern const DenseDecode PORTABLE_DECODE, AVX2_DECODE;

// The epilogue of one block; sums [tile.rows][16], 64-byte aligned, as portable_finish() takes them.
struct DenseFinish {
  void (*floats)(const Linear& call, const Tile& tile, int64_t block, const float* sums);
  void (*integers)(const Linear& call, const Tile& tile, int64_t block, const int32_t* sums);
};
const DenseFinish& dense_finish();  // of the active ISA
extern const DenseFinish PORTABLE_FINISH, AVX512_FINISH;

// The columns of a decoded row: those of x, filled up to whole chunks.
inline int64_t dense_columns(const Linear& call) {
  return chunk_count(call.weight, call.in_features) * chunk_columns(call.weight);
}

// Whether torch's product of int8 is exact here (without VNNI it may saturate), and whether it has one of bfloat16.
bool has_exact_int8_product();
bool has_bf16_product();

// Whether no element of a float x is Inf or NaN: only then is a dense product the sparse one.
bool all_finite(const Linear& call);

// Rows [first, last) of x as the product takes them, one after the other, dense_columns() each. `element` is F32, BF16
// (for a BF16 W), or for W whose x is quantised I8 or F32, which get the integers.
void prepare_x(const Linear& call, int64_t first, int64_t last, Element element, void* rows, float* x_scales);

// The columns of a float product of integers up to which all sums are exact: they stay within 2^24.
constexpr int64_t EXACT_COLUMNS = 2048;
static_assert(EXACT_COLUMNS / 2 * 128 * 128 <= 1 << 24, "half the columns hold a product of two int8");

// The epilogue of tokens [first, last) of y and of the columns of blocks [first_block, last_block), from their sums:
// [tokens][stride] from `first` and `first_block` on, of float, of BF16, or of int32 without compensation; with scale
// groups their totals, of float.
// x_scales: [tokens] from `first` on.
void finish_dense(const Linear& call, int64_t first, int64_t last, int64_t first_block, int64_t last_block,
                  Number sum_type, const void* sums, int64_t stride, const float* x_scales);

}  // namespace sparse24::cpu
