// The tiles of kernels/linear_sm80.cuh: what the kernels and the host must agree on.
#pragma once
#include "packed.cuh"

namespace sparse24::tiles {

constexpr int LINE = 128;  // bytes of one token's x in one column block, for 8- and 16-bit elements alike

// Warps of warp_rows x warp_tokens make a tile of rows x tokens (rows of W, that is output features, first).
//
// One SM reads a warp's fragments from shared memory at 64 * (36 / warp_tokens + 64 / warp_rows) bytes a clock at the
// full rate of the tensor cores (16-bit W; 40 instead of 36 for 8-bit), and the copies of a stage add to that, against
// the 128 that shared memory gives: W is half size, so warps and tiles are longer along W. docs/kernels.md does the sum
// for each tile.
struct Tile {
  int rows, tokens;
  int warp_rows, warp_tokens;
  int stages;                   // of the ring in shared memory, one column block each
  int copy_run_16, copy_run_8;  // copies in a row, for W of 16 and 8 bits: what ptxas schedules best (copy_comes_at)

  bool padded;  // the last round of copies of W, if part empty: zeros from the threads without a piece, or nothing. As
                // the runs, what ptxas schedules best

  SPARSE24_INLINE constexpr int copy_run(int bits) const { return bits == 16 ? copy_run_16 : copy_run_8; }
  SPARSE24_INLINE constexpr int threads() const { return 32 * (rows / warp_rows) * (tokens / warp_tokens); }
  // 16-byte pieces of W in a stage, and how many each thread copies; the last round may be part empty.
  SPARSE24_INLINE constexpr int w_pieces(int bits) const {
    return rows / packed::BLOCK_ROWS * packed::block_bytes(bits) / 16;
  }
  SPARSE24_INLINE constexpr int w_copies(int bits) const { return (w_pieces(bits) + threads() - 1) / threads(); }
  SPARSE24_INLINE constexpr int w_bytes(int bits) const {
    return (padded ? w_copies(bits) * threads() : w_pieces(bits)) * 16;
  }
  SPARSE24_INLINE constexpr int stage_bytes(int bits) const { return w_bytes(bits) + tokens * LINE; }
  SPARSE24_INLINE constexpr int shared_bytes(int bits) const { return stages * stage_bytes(bits); }
  // That fit into the shared memory of an A100's multiprocessor, for __launch_bounds__: ptxas, which does not know of
  // dynamic shared memory, would save registers for more.
  SPARSE24_INLINE constexpr int blocks(int bits) const { return (164 << 10) / (shared_bytes(bits) + 1024); }
};

// Shared memory with 16-bit W in KB, and what an SM of each architecture holds: in docs/kernels.md.
constexpr Tile TILE_256x128{256, 128, 64, 64, 3, 5, 6, false};
constexpr Tile TILE_192x256{192, 256, 96, 64, 3, 3, 3, false};
constexpr Tile TILE_192x128{192, 128, 96, 64, 3, 6, 3, true};
constexpr Tile TILE_128x128{128, 128, 64, 64, 3, 5, 4, false};
constexpr Tile TILE_64x128{64, 128, 64, 32, 3, 5, 5, false};
constexpr Tile TILE_64x64{64, 64, 32, 32, 3, 5, 5, false};

}  // namespace sparse24::tiles
