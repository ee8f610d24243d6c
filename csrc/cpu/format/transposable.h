// The masks that are 2:4 along rows and along columns (sparse24/masks.py). No torch.
#pragma once
#include <cstdint>

namespace sparse24::cpu {

constexpr int TILE = 4;  // rows and columns of one problem

// mask[rows][columns], 1 where an entry stays: of each TILE x TILE entries of scores, rows `stride` apart, two of every
// row and column, so that the sum of |scores| is the largest; of equal ones the first of masks in lexicographic order,
// where what stays comes before what goes. Sums are made in double. Inf ranks above all numbers and NaN above Inf.
// rows and columns are multiples of TILE.
void transposable_mask(const float* scores, int64_t stride, int64_t rows, int64_t columns, uint8_t* mask);

// Of the TILE rows of one band, on the calling thread, for each instruction set.
using TransposableBand = void (*)(const float* scores, int64_t stride, int64_t columns, uint8_t* mask);
void avx2_transposable_band(const float* scores, int64_t stride, int64_t columns, uint8_t* mask);
void avx512_transposable_band(const float* scores, int64_t stride, int64_t columns, uint8_t* mask);

}  // namespace sparse24::cpu
