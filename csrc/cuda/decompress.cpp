// The launch of kernels/decompress.cu.
#include "kernels/decompress.cuh"

#include <algorithm>
#include <cstddef>

#include "csrc/cuda/linear.h"

namespace sparse24::cuda {

namespace {

using decompress::BLOCK_BYTES, decompress::BLOCK_ROWS;
constexpr int64_t MAX_GRID_Y = 65535;  // CUDA C++ Programming Guide, compute capabilities; rows beyond it loop

const char* kernel_name(Element element, Pattern pattern) {
  const bool pair = pattern == Pattern::PAIR_FOUR_EIGHT;
  switch (element_bits(element)) {
    case 4:
      return pair ? "decompress_b8" : "decompress_b4";
    case 8:
      return pair ? "decompress_pair_b8" : "decompress_b8";
    case 16:
      return pair ? "decompress_pair_b16" : "decompress_b16";
    default:
      return pair ? "decompress_pair_b32" : "decompress_b32";
  }
}

}  // namespace

Launch describe_decompress(const void* values, const uint8_t* meta, void* dense, int64_t rows, int64_t in_features,
                           Element element, Pattern pattern) {
  const bool pairs_are_bytes = element == Element::I4 && pattern == Pattern::PAIR_FOUR_EIGHT;
  const int64_t columns = pairs_are_bytes ? (in_features + 1) / 2 : in_features;
  const int64_t row_bytes = meta_row_bytes(pattern, in_features);
  const size_t alignment = std::max(element_bits(element) / 8, 1);
  using Arguments = DecompressArguments;

  Launch launch;
  launch.module = &DECOMPRESS_MODULE;
  launch.kernel = kernel_name(element, pattern);
  launch.block = {BLOCK_BYTES, BLOCK_ROWS};
  launch.grid = {static_cast<unsigned>((row_bytes + BLOCK_BYTES - 1) / BLOCK_BYTES),
                 static_cast<unsigned>(std::min((rows + BLOCK_ROWS - 1) / BLOCK_ROWS, MAX_GRID_Y))};
  launch.pass(Arguments{values, meta, dense, rows, columns});
  launch.reads(offsetof(Arguments, values), values, rows * values_row_bytes(pattern, element, in_features), alignment);
  launch.reads(offsetof(Arguments, meta), meta, rows * row_bytes);
  launch.writes(offsetof(Arguments, dense), dense, rows * dense_row_bytes(element, in_features), alignment);
  return launch;
}

}  // namespace sparse24::cuda
