// A band of transposable_mask() in vectors of the compiler's, which each instruction set lowers as it can: a lane a
// tile.
#pragma once
#include <cmath>
#include <cstring>

#include "csrc/cpu/format/transposable.h"
#include "kernels/format.cuh"

namespace sparse24::cpu {
namespace {

constexpr int LANES = 8;  // tiles at a time
constexpr int ROW_WAYS = 6, WAYS = 90;
using Sums = double __attribute__((vector_size(LANES * sizeof(double))));
using Numbers = int64_t __attribute__((vector_size(LANES * sizeof(int64_t))));

// The ways to keep two entries of a row, and those of its four rows that keep two entries of each column.
struct Ways {
  uint8_t columns[ROW_WAYS][2], kept[ROW_WAYS][TILE], rows[WAYS][TILE];

  constexpr Ways() : columns(), kept(), rows() {
    int ways = 0;
    for (uint8_t first = 0; first < TILE; ++first) {
      for (uint8_t second = first + 1; second < TILE; ++second, ++ways) {
        columns[ways][0] = first, columns[ways][1] = second;
        kept[ways][first] = kept[ways][second] = 1;
      }
    }
    int found = 0;
    for (int tile = 0; tile < ROW_WAYS * ROW_WAYS * ROW_WAYS * ROW_WAYS; ++tile) {
      const int way[TILE] = {tile / 216, tile / 36 % 6, tile / 6 % 6, tile % 6};
      bool fits = true;
      for (int column = 0; column < TILE; ++column) {
        int stay = 0;
        for (int row = 0; row < TILE; ++row) stay += kept[way[row]][column];
        fits = fits && stay == 2;
      }
      for (int row = 0; fits && row < TILE; ++row) rows[found][row] = static_cast<uint8_t>(way[row]);
      found += fits;
    }
  }
};
constexpr Ways TABLE;

// |score| as a number that adds up: Inf and NaN become larger than what sixteen others can sum to, and powers of two,
// so that sums of them are exact.
SPARSE24_INLINE double ranked(float score) {
  if (std::isnan(score)) return 0x1p1018;
  return std::isinf(score) ? 0x1p1010 : std::fabs(static_cast<double>(score));
}

// Up to LANES tiles side by side.
SPARSE24_INLINE void choose(const float* scores, int64_t stride, int64_t columns, int tiles, uint8_t* mask) {
  double sizes[TILE][TILE][LANES] = {};
  for (int row = 0; row < TILE; ++row) {
    for (int i = 0; i < tiles * TILE; ++i) sizes[row][i % TILE][i / TILE] = ranked(scores[row * stride + i]);
  }
  Sums pairs[TILE][ROW_WAYS];
#pragma GCC unroll 4
  for (int row = 0; row < TILE; ++row) {
#pragma GCC unroll 6
    for (int way = 0; way < ROW_WAYS; ++way) {
      Sums a, b;
      std::memcpy(&a, sizes[row][TABLE.columns[way][0]], sizeof a);
      std::memcpy(&b, sizes[row][TABLE.columns[way][1]], sizeof b);
      pairs[row][way] = a + b;
    }
  }
  Sums best = Sums{} - 1;
  Numbers chosen = {};
#pragma GCC unroll 90
  for (int way = 0; way < WAYS; ++way) {
    const uint8_t (&rows)[TILE] = TABLE.rows[way];
    const Sums sum = (pairs[0][rows[0]] + pairs[1][rows[1]]) + (pairs[2][rows[2]] + pairs[3][rows[3]]);
    const Numbers larger = sum > best;
    best = larger ? sum : best;
    chosen = larger ? Numbers{} + way : chosen;
  }
  for (int tile = 0; tile < tiles; ++tile) {
    for (int row = 0; row < TILE; ++row) {
      std::memcpy(mask + row * columns + tile * TILE, TABLE.kept[TABLE.rows[chosen[tile]][row]], TILE);
    }
  }
}

SPARSE24_INLINE void transposable_band_here(const float* scores, int64_t stride, int64_t columns, uint8_t* mask) {
  const int64_t tiles = columns / TILE;
  int64_t tile = 0;
  for (; tile + LANES <= tiles; tile += LANES) choose(scores + tile * TILE, stride, columns, LANES, mask + tile * TILE);
  if (tile < tiles) {
    choose(scores + tile * TILE, stride, columns, static_cast<int>(tiles - tile), mask + tile * TILE);
  }
}

}  // namespace
}  // namespace sparse24::cpu
