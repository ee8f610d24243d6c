// How kernels/decompress.cu is launched: what host and kernel must agree on.
#pragma once
#include "format.cuh"

namespace sparse24 {

struct DecompressArguments {
  const void* values;   // [rows, 2 * ceil(columns / 4)], of pairs [rows, 4 * ceil(columns / 8)]
  const uint8_t* meta;  // a byte for two groups
  void* dense;          // [rows, columns]
  int64_t rows, columns;
};

namespace decompress {
constexpr int BLOCK_BYTES = 32;  // of meta: a warp along one row
constexpr int BLOCK_ROWS = 8;    // 256 threads, full occupancy at any register count this kernel can reach
}  // namespace decompress

}  // namespace sparse24
