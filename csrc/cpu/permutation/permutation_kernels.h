// kept_by_splits() in vectors of the compiler's, which each instruction set lowers as it can.
#pragma once
#include <cstring>

#include "csrc/cpu/permutation/permutation.h"
#include "kernels/format.cuh"

namespace sparse24::cpu {
namespace {

constexpr int LANES = 16;         // rows at a time
constexpr int FLOAT_BLOCKS = 32;  // of rows, whose sums are floats
constexpr int PAIRS = SPLIT_COLUMNS * (SPLIT_COLUMNS - 1) / 2;
using Lanes = float __attribute__((vector_size(LANES * sizeof(float))));

// The pairs of eight columns, and the six pairs of either four of each split.
struct Splits {
  uint8_t column[PAIRS][2], pair[SPLITS][2][6];

  constexpr Splits() : column(), pair() {
    int index[SPLIT_COLUMNS][SPLIT_COLUMNS] = {}, pairs = 0, split = 0;
    for (int i = 0; i < SPLIT_COLUMNS; ++i) {
      for (int j = i + 1; j < SPLIT_COLUMNS; ++j) {
        column[pairs][0] = static_cast<uint8_t>(i), column[pairs][1] = static_cast<uint8_t>(j);
        index[i][j] = pairs++;
      }
    }
    for (int a = 1; a < SPLIT_COLUMNS; ++a) {
      for (int b = a + 1; b < SPLIT_COLUMNS; ++b) {
        for (int c = b + 1; c < SPLIT_COLUMNS; ++c, ++split) {
          int four[2][4] = {{0, a, b, c}, {}}, others = 0;
          for (int i = 1; i < SPLIT_COLUMNS; ++i) {
            if (i != a && i != b && i != c) four[1][others++] = i;
          }
          for (int side = 0; side < 2; ++side) {
            int at = 0;
            for (int i = 0; i < 4; ++i) {
              for (int j = i + 1; j < 4; ++j) {
                pair[split][side][at++] = static_cast<uint8_t>(index[four[side][i]][four[side][j]]);
              }
            }
          }
        }
      }
    }
  }
};
constexpr Splits TABLE;

// By reference: how such vectors are passed by value hangs on the instruction set.
SPARSE24_INLINE void keep_larger(Lanes& a, const Lanes& b) { a = a > b ? a : b; }

// Of 16 rows; `sums` gains the two largest of either four, for each split.
SPARSE24_INLINE void add_rows(const Lanes (&columns)[SPLIT_COLUMNS], Lanes (&sums)[SPLITS]) {
  Lanes pairs[PAIRS];
#pragma GCC unroll 28
  for (int i = 0; i < PAIRS; ++i) pairs[i] = columns[TABLE.column[i][0]] + columns[TABLE.column[i][1]];
#pragma GCC unroll 35
  for (int split = 0; split < SPLITS; ++split) {
#pragma GCC unroll 2
    for (int side = 0; side < 2; ++side) {
      const auto& six = TABLE.pair[split][side];
      Lanes largest = pairs[six[0]];
#pragma GCC unroll 5
      for (int i = 1; i < 6; ++i) keep_larger(largest, pairs[six[i]]);
      sums[split] += largest;
    }
  }
}

SPARSE24_INLINE void kept_by_splits_here(const float* sizes, int64_t rows, const int64_t* eights, int64_t count,
                                         double* kept) {
  for (int64_t i = 0; i < count; ++i, eights += SPLIT_COLUMNS, kept += SPLITS) {
    for (int split = 0; split < SPLITS; ++split) kept[split] = 0;
    for (int64_t row = 0; row < rows;) {
      Lanes sums[SPLITS] = {};
      for (int block = 0; block < FLOAT_BLOCKS && row < rows; ++block, row += LANES) {
        Lanes columns[SPLIT_COLUMNS] = {};
        const size_t bytes = (rows - row < LANES ? rows - row : LANES) * sizeof(float);
        for (int j = 0; j < SPLIT_COLUMNS; ++j) std::memcpy(&columns[j], sizes + eights[j] * rows + row, bytes);
        add_rows(columns, sums);
      }
      for (int split = 0; split < SPLITS; ++split) {
        for (int lane = 0; lane < LANES; ++lane) kept[split] += static_cast<double>(sums[split][lane]);
      }
    }
  }
}

}  // namespace
}  // namespace sparse24::cpu
