// What 2:4 keeps of two groups of columns, however the eight are cut into four and four: the inner loop of a search for
// orders of channels (sparse24/permutation.py). No torch.
#pragma once
#include <cstdint>

namespace sparse24::cpu {

constexpr int SPLIT_COLUMNS = 8;
constexpr int SPLITS = 35;  // by the four that the first column is in, in lexicographic order

// sizes: [columns][rows], not negative. eights: [count][8] columns. kept: [count][35], the sum over all rows of the two
// largest of either four. Sums of 512 rows are made in float, those of them in double.
void kept_by_splits(const float* sizes, int64_t rows, const int64_t* eights, int64_t count, double* kept);

// The same on the calling thread, for each instruction set.
using KeptBySplits = void (*)(const float* sizes, int64_t rows, const int64_t* eights, int64_t count, double* kept);
void avx2_kept_by_splits(const float* sizes, int64_t rows, const int64_t* eights, int64_t count, double* kept);
void avx512_kept_by_splits(const float* sizes, int64_t rows, const int64_t* eights, int64_t count, double* kept);

}  // namespace sparse24::cpu
