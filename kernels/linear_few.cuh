// How a product with few tokens is launched (kernels/linear_few.cu): what host and kernel must agree on.
#pragma once
#include "packed.cuh"

namespace sparse24::few {

constexpr int MAX_TOKENS = 16;
constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;  // and no dynamic shared memory

// A kernel is named after its tile: linear_few_f16_32x8 makes 32 features of 8 tokens a block; there are 16x8, 32x8,
// 32x16 and 64x16. With each byte of W from memory comes x from L2: 0.9 bytes in the lower tiles, 0.4 in the higher
// ones (all its tokens there). L2 gives two or three times what memory does, so the higher tile is the better one as
// long as it keeps every multiprocessor busy.
constexpr int tile_tokens(int tokens) { return tokens <= 8 ? 8 : 16; }
constexpr int tile_rows(int tokens, int64_t out_features, int multiprocessors) {
  const int low = 2 * tile_tokens(tokens), high = 2 * low;
  return tokens > tile_tokens(tokens) / 2 && out_features >= int64_t{high} * multiprocessors ? high : low;
}

// The grid is (ceil(out_features / rows), 1, splits). Splits cost a second launch, and pay where blocks are so few that
// multiprocessors would be idle while each block reads several times SPLIT_BYTES (a block gets 50 to 90 GB/s: 2 us).
constexpr int64_t SPLIT_BYTES = 128 << 10;

constexpr int splits(int bits, int rows, int64_t out_features, int64_t in_features, int multiprocessors) {
  const int64_t blocks = (out_features + rows - 1) / rows;
  const int64_t bytes =
      packed::column_blocks(bits, in_features) * packed::block_bytes(bits) * (rows / packed::BLOCK_ROWS);
  const int64_t most = multiprocessors / blocks, worthwhile = bytes / SPLIT_BYTES;
  const int64_t count = most < worthwhile ? most : worthwhile;
  return count > 1 ? static_cast<int>(count) : 1;
}

}  // namespace sparse24::few
