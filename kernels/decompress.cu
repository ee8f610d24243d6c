// dense = decompress(values, meta), for every element type and pattern.
//
// One thread takes one byte of meta, that is two groups, and writes their eight units. A block is 32 bytes of meta wide
// and 8 rows tall: a warp reads 32 consecutive bytes of meta and the values beside each other, and writes one stretch
// of one row. Illegal codes cost nothing but wrong numbers: every address is checked against in_features, never
// against meta.
//
//   meta byte b of row r        values of row r                 dense row r
//   [ code 2b | code 2b+1 ] ->  units 4b .. 4b+3           ->   units 8b .. 8b+7
#include "decompress.cuh"

namespace sparse24 {

using decompress::BLOCK_BYTES, decompress::BLOCK_ROWS;

// A unit is PAIR elements of T: one, or two for pair 4:8.
template <typename T, int PAIR>
__device__ __forceinline__ void decompress_rows(const T* __restrict__ values,      // [rows, 2 * PAIR * groups]
                                                const uint8_t* __restrict__ meta,  // [rows, (groups + 1) / 2]
                                                T* __restrict__ dense,             // [rows, columns]
                                                int64_t rows, int64_t columns) {
  const int64_t groups = (columns + 4 * PAIR - 1) / (4 * PAIR);
  const int64_t row_bytes = (groups + 1) / 2;
  const int64_t byte = int64_t(blockIdx.x) * BLOCK_BYTES + threadIdx.x;
  if (byte >= row_bytes) return;

  for (int64_t row = int64_t(blockIdx.y) * BLOCK_ROWS + threadIdx.y; row < rows;
       row += int64_t(gridDim.y) * BLOCK_ROWS) {
    const int codes = meta[row * row_bytes + byte];
    for (int half = 0; half < 2; ++half) {
      const int64_t group = 2 * byte + half;
      if (group >= groups) break;
      const int code = (codes >> (4 * half)) & 15;
      const T* kept = values + (row * groups + group) * 2 * PAIR;
      for (int unit = 0; unit < 4; ++unit) {
        for (int i = 0; i < PAIR; ++i) {
          const int64_t column = (group * 4 + unit) * PAIR + i;
          if (column >= columns) break;
          const T first = kept[i], second = kept[PAIR + i];
          dense[row * columns + column] = unit == first_of(code) ? first : unit == second_of(code) ? second : T(0);
        }
      }
    }
  }
}

// int4 in element 2:4: a group is two bytes of the dense row and one byte of values.
__device__ __forceinline__ void decompress_nibble_rows(const uint8_t* __restrict__ values,  // [rows, groups]
                                                       const uint8_t* __restrict__ meta,    // [rows, (groups + 1) / 2]
                                                       uint8_t* __restrict__ dense,         // [rows, (columns + 1) / 2]
                                                       int64_t rows, int64_t columns) {
  const int64_t groups = (columns + 3) / 4, row_bytes = (groups + 1) / 2, dense_bytes = (columns + 1) / 2;
  const int64_t byte = int64_t(blockIdx.x) * BLOCK_BYTES + threadIdx.x;
  if (byte >= row_bytes) return;

  for (int64_t row = int64_t(blockIdx.y) * BLOCK_ROWS + threadIdx.y; row < rows;
       row += int64_t(gridDim.y) * BLOCK_ROWS) {
    const int codes = meta[row * row_bytes + byte];
    for (int half = 0; half < 2; ++half) {
      const int64_t group = 2 * byte + half;
      if (group >= groups) break;
      const int code = (codes >> (4 * half)) & 15;
      const int kept = values[row * groups + group];
      for (int b = 0; b < 2; ++b) {
        int nibbles = 0;
        for (int i = 0; i < 2; ++i) {
          const int unit = 2 * b + i;
          const int nibble = group * 4 + unit >= columns ? 0
                             : unit == first_of(code)    ? kept & 15
                             : unit == second_of(code)   ? kept >> 4
                                                         : 0;
          nibbles |= nibble << (4 * i);
        }
        if (group * 2 + b < dense_bytes) dense[row * dense_bytes + group * 2 + b] = uint8_t(nibbles);
      }
    }
  }
}

}  // namespace sparse24

// pair 4:8 on int4 is decompress_b8 on bytes, with columns = ceil(K / 2).
#define SPARSE24_DECOMPRESS(NAME, T, PAIR)                                                                   \
  extern "C" __global__ void NAME(const __grid_constant__ sparse24::DecompressArguments arguments) {         \
    sparse24::decompress_rows<T, PAIR>(static_cast<const T*>(arguments.values), arguments.meta,              \
                                       static_cast<T*>(arguments.dense), arguments.rows, arguments.columns); \
  }
SPARSE24_DECOMPRESS(decompress_b8, uint8_t, 1)
SPARSE24_DECOMPRESS(decompress_b16, uint16_t, 1)
SPARSE24_DECOMPRESS(decompress_b32, uint32_t, 1)
SPARSE24_DECOMPRESS(decompress_pair_b8, uint8_t, 2)
SPARSE24_DECOMPRESS(decompress_pair_b16, uint16_t, 2)
SPARSE24_DECOMPRESS(decompress_pair_b32, uint32_t, 2)
#undef SPARSE24_DECOMPRESS

extern "C" __global__ void decompress_b4(const __grid_constant__ sparse24::DecompressArguments arguments) {
  sparse24::decompress_nibble_rows(static_cast<const uint8_t*>(arguments.values), arguments.meta,
                                   static_cast<uint8_t*>(arguments.dense), arguments.rows, arguments.columns);
}
