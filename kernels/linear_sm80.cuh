// y = epilogue(x W^T) on the sparse tensor cores of sm_80 and later: mma.sp with W as the sparse operand A and x
// [tokens, K], as it lies in memory, as operand B. Any tokens, N and K.
//
// A block makes a tile of TILE.rows output features by TILE.tokens tokens (kernels/linear_tiles.cuh). K goes by in
// column blocks of W: two steps of mma.sp, 128 bytes of each token's x. cp.async brings them into a ring of stages:
//
//   stage   [ W: TILE.rows / 16 blocks of packed.cuh, copied as they lie | x: TILE.tokens lines of 128 bytes ]
//
// W lies in fragment order, so a lane reads its A fragment with one 16-byte load. A line of x holds eight 16-byte
// chunks; chunk c lies at place c ^ (token % 8), so that neither the copies nor ldmatrix meet a bank twice.
//
// Fragments: a warp holds all its A fragments of one step and two B fragments (eight tokens each), the second of which
// is loaded while the first is multiplied. The last products of a step free one A fragment after the other, into which
// that of the next step is loaded at once, across the boundary of a stage too. Every address of the main loop is a
// register plus a constant: stages are moved through by adding to a few registers once a block.
//
// Tails. K: the last column block is multiplied first, when the ring is filled, so that only there the copies of x may
// be short; they fill up with zeros, and packed W is padded with legal metadata. Tokens: lines beyond the last read the
// last token's x again, and nobody stores the sums. Output features: the last tile slides back to end with W, and
// stores what the tile before does not.
//
// This text is compiled once, for compute_80, and assembled for every architecture.
#pragma once
#include "epilogue.cuh"
#include "fragment.cuh"
#include "linear.cuh"
#include "linear_tiles.cuh"
#include "ptx.cuh"
#include "weight_type.cuh"

namespace sparse24::tiles {

// How x comes into shared memory. Both its address and the distance between rows are multiples of that many bytes.
enum class Loader { BY_16, BY_4, BY_1 };

// f(Index<0>{}), ..., f(Index<COUNT - 1>{}): loops whose counter is a constant.
template <int I>
struct Index {
  static constexpr int value = I;
  constexpr operator int() const { return I; }
};
template <int COUNT, int I = 0, class Body>
__device__ __forceinline__ void unroll(Body&& body) {
  if constexpr (I < COUNT) {
    body(Index<I>{});
    unroll<COUNT, I + 1>(body);
  }
}

// ---- From global memory into the ring -----------------------------------------------------------------------------

// What one thread copies of each column block.
template <class Weight, Tile TILE, Loader LOADER>
struct Copies {
  static constexpr int W_COPIES = TILE.w_copies(Weight::BITS), W_PIECES = TILE.w_pieces(Weight::BITS);
  static constexpr int W_BYTES = TILE.w_bytes(Weight::BITS), STAGE_BYTES = TILE.stage_bytes(Weight::BITS);
  static constexpr int THREADS = TILE.threads();
  static constexpr int PIECE = LOADER == Loader::BY_4 ? 4 : 16;  // bytes of x in one copy
  static constexpr int PIECES_A_LINE = LINE / PIECE;
  static constexpr int LINES = THREADS / PIECES_A_LINE;  // that all threads copy at once
  static constexpr int X_COPIES = TILE.tokens / LINES;
  static constexpr int COUNT = W_COPIES + X_COPIES;

  static_assert(TILE.tokens % LINES == 0, "every thread copies as many pieces of x; change the tile's tokens");

  const uint8_t* w_gl;  // this thread's first piece of W in the next column block
  const uint8_t* x_gl;  // this thread's first piece of x in the next column block
  uint32_t w_step;      // bytes from one column block of W to the next
  uint32_t x_stride;    // bytes from one token to the next
  uint32_t more_lines;  // last valid line - this thread's first one, not below 0
  uint32_t wr;          // shared address of this thread's first 16 bytes in the stage to be written
  int32_t row_bytes;    // of x
  int32_t place;        // byte of a row of x at which this thread's piece of column block 0 begins
  bool last_w_copy;     // whether the last round has a piece of W for this thread

  __device__ Copies(const LinearArguments& arguments, int row_block, int first_token, uint32_t ring) {
    const int thread = threadIdx.x, line = thread / PIECES_A_LINE;
    const int last_line = arguments.epilogue.tokens - 1 - first_token;
    // The place in shared memory follows the thread, so the swizzle is applied to where x is read. With pieces of 4
    // bytes a warp copies one line; lines of later copies have other swizzles: x_copy says how.
    place = LOADER == Loader::BY_4 ? thread % PIECES_A_LINE * PIECE : ((thread % 8) ^ (line % 8)) * 16;
    w_step = static_cast<uint32_t>(arguments.row_blocks) * packed::block_bytes(Weight::BITS);
    w_gl = arguments.packed + int64_t{row_block} * packed::block_bytes(Weight::BITS) + thread * 16;
    x_gl = static_cast<const uint8_t*>(arguments.x) + (first_token + min(line, last_line)) * arguments.x_stride + place;
    x_stride = static_cast<uint32_t>(arguments.x_stride);
    more_lines = static_cast<uint32_t>(max(last_line - line, 0));
    wr = ring + thread * 16;
    row_bytes = arguments.in_features * (Weight::BITS / 8);
    last_w_copy = (W_COPIES - 1) * THREADS + thread < W_PIECES;
  }

  __device__ __forceinline__ void go_to(int column_block) {
    w_gl += column_block * int64_t{w_step};
    x_gl += int64_t{column_block} * LINE;
  }

  // Copy q of COUNT. Where the block does not exist, zeros are written and nothing is read.
  template <int Q>
  __device__ __forceinline__ void copy(Index<Q>, bool exists, int column_block, bool ragged) {
    if constexpr (Q < W_COPIES) {
      const bool mine = (Q + 1) * THREADS <= W_PIECES || last_w_copy;
      if (TILE.padded || mine) ptx::cp_async_16<Q * THREADS * 16, Q * THREADS * 16>(wr, w_gl, exists && mine ? 16 : 0);
    } else {
      x_copy(Index<Q - W_COPIES>{}, exists, column_block, ragged);
    }
  }

  template <int I>
  __device__ __forceinline__ void x_copy(Index<I>, bool exists, int column_block, bool ragged) {
    const uint8_t* from = x_gl;
    if constexpr (I > 0) from = ptx::step_on<I * LINES>(x_gl, more_lines, x_stride);
    if constexpr (LOADER == Loader::BY_16) {
      int bytes = 16;
      if (ragged) bytes = max(0, min(16, row_bytes - column_block * LINE - place));
      ptx::cp_async_16<W_BYTES + I * THREADS * 16, 0>(wr, from, exists ? bytes : 0);
    } else if constexpr (LOADER == Loader::BY_4) {
      // Line l, piece p: chunk p / 4 goes to place (p / 4) ^ (l % 8).
      const int thread = threadIdx.x, line = thread / PIECES_A_LINE + I * LINES, piece = thread % PIECES_A_LINE;
      const uint32_t to = wr - thread * 16 + W_BYTES + line * LINE + (((piece / 4) ^ (line % 8)) * 16) + piece % 4 * 4;
      const int bytes = max(0, min(4, row_bytes - column_block * LINE - place));
      ptx::cp_async_cached<4>(to, from, exists ? bytes : 0);
    } else {
      const int bytes = exists ? row_bytes - column_block * LINE - place : 0;
      ptx::store_shared<W_BYTES + I * THREADS * 16>(wr, load_elements(from, bytes));
    }
  }

  // 16 bytes of elements at any address of theirs; those from `bytes` on are zeros.
  static __device__ __forceinline__ uint4 load_elements(const uint8_t* from, int bytes) {
    using Unit = typename Weight::Unit;
    uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 16 / int(sizeof(Unit)); ++i) {
      const uint32_t unit = i * int(sizeof(Unit)) < bytes ? __ldg(reinterpret_cast<const Unit*>(from) + i) : 0;
      words[i * sizeof(Unit) / 4] |= unit << (i * sizeof(Unit) % 4 * 8);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
};

// Whether copy q of `count` comes before the product of strip `strip` in slot `slot`. ptxas puts an expensive fence
// before a copy that follows a load from shared memory (three loads that do nothing), so a run of copies follow
// each other, between the products of one slot; the runs are spread over the slots that have no other duty.
template <class Weight, Tile TILE, Loader LOADER>
SPARSE24_INLINE constexpr bool copy_comes_at(int q, int count, int slot, int strip) {
  const int run = TILE.copy_run(Weight::BITS);
  const int strips = TILE.warp_rows / fragment::ROWS, groups = TILE.warp_tokens / fragment::TOKENS;
  if (LOADER != Loader::BY_16) return slot == 0 && strip == strips - 1;  // many copies: all at once
  const int group = slot % groups, step = slot / groups;
  if (group == groups - 1) return false;  // the next step's A fragments are loaded here
  const int runs = (count + run - 1) / run, places = packed::STEPS * (groups - 1);
  return q / run * places / runs == step * (groups - 1) + group && 1 + q % run * (strips - 1) / run == strip;
}

// Where a thread's warp and block stand.
template <Tile TILE>
struct Position {
  static constexpr int BLOCKS = TILE.rows / packed::BLOCK_ROWS;  // of packed W along a tile

  int lane, warp;
  int warp_row, warp_token;  // of the warp's part, in the tile
  int row_tile, row_block;   // the tile's first block of W: the last tile slides back to end with W
  int first_token;           // of the tile

  // Tiles beside each other along W share x and come one after the other.
  __device__ __forceinline__ explicit Position(int row_blocks) {
    const int thread = ptx::thread_index(), tile = ptx::block_index();
    constexpr int WARPS_ALONG_W = TILE.rows / TILE.warp_rows;
    lane = thread % 32, warp = thread / 32;
    warp_row = warp % WARPS_ALONG_W * TILE.warp_rows, warp_token = warp / WARPS_ALONG_W * TILE.warp_tokens;
    const int row_tiles = (row_blocks + BLOCKS - 1) / BLOCKS;
    row_tile = tile % row_tiles;
    row_block = min(row_tile * BLOCKS, row_blocks - BLOCKS);
    first_token = tile / row_tiles * TILE.tokens;
  }
};

// ---- The kernel ---------------------------------------------------------------------------------------------------

template <class Weight, Tile TILE, Loader LOADER = Loader::BY_16>
__device__ __forceinline__ void linear_tile(const LinearArguments& arguments) {
  using Sum = typename Weight::Sum;
  using Copying = Copies<Weight, TILE, LOADER>;
  constexpr int BLOCK_BYTES = packed::block_bytes(Weight::BITS);
  constexpr int STAGE_BYTES = Copying::STAGE_BYTES, STAGES = TILE.stages;
  constexpr int STRIPS = TILE.warp_rows / fragment::ROWS;      // A fragments of a warp in one step
  constexpr int GROUPS = TILE.warp_tokens / fragment::TOKENS;  // B fragments of a warp in one step
  constexpr int SLOTS = packed::STEPS * GROUPS;                // a slot: the products of one B fragment
  static_assert(TILE.rows % packed::ROW_PADDING == 0, "W is padded to 64 rows, so that a tile can slide back");
  static_assert(STRIPS * GROUPS * 4 <= 192, "more sums than that leave no registers for fragments and addresses");
  static_assert(STAGES >= 2, "one stage is read while another is written");

  extern __shared__ __align__(128) uint8_t ring_bytes[];
  const uint32_t ring = ptx::shared_address(ring_bytes);
  const Position<TILE> at(arguments.row_blocks);
  const int first_block = blockIdx.z * arguments.split_blocks;
  int left = min(arguments.column_blocks - first_block, arguments.split_blocks);

  // ---- Fill the ring: the last column block, which may be ragged, then the first ones ----

  Copying copies(arguments, at.row_block, at.first_token, ring);
  int column_block = first_block + left - 1;
  copies.go_to(column_block);
  unroll<Copying::COUNT>([&](auto q) { copies.copy(q, true, column_block, true); });
  ptx::cp_async_commit();
  copies.go_to(1 - left);
  column_block = first_block;
  copies.wr += STAGE_BYTES;
#pragma unroll
  for (int stage = 1; stage < STAGES - 1; ++stage) {
    if (stage < left) unroll<Copying::COUNT>([&](auto q) { copies.copy(q, true, column_block, false); });
    ptx::cp_async_commit();
    copies.go_to(1);
    ++column_block;
    copies.wr += STAGE_BYTES;
  }

  // ---- Fragments ----

  Sum sums[STRIPS][GROUPS][4] = {};
  uint4 a[STRIPS];
  uint32_t meta[STRIPS];
  uint32_t b[2][4];

  const uint32_t w_rd = ring + at.warp_row / packed::BLOCK_ROWS * BLOCK_BYTES + at.lane * 16;
  const uint32_t meta_rd = w_rd + packed::VALUE_BYTES - at.lane * 12;
  // Lane l gives ldmatrix the address of token l % 8, chunk l / 8 of the step's four.
  const uint32_t x_rd =
      ring + Copying::W_BYTES + (at.warp_token + at.lane % 8) * LINE + (((at.lane / 8) ^ (at.lane % 8)) * 16);

  const uint32_t x_rds[packed::STEPS] = {x_rd, x_rd ^ 64};

  uint32_t stage = 0;  // bytes from the ring's start to the stage that is multiplied
  auto load_a = [&]<int STRIP, int STEP>(Index<STRIP>, Index<STEP>, uint32_t from) {
    ptx::load_shared<STRIP * BLOCK_BYTES + STEP * packed::VALUE_BYTES / packed::STEPS>(a[STRIP], w_rd + from);
    if constexpr (STEP < Weight::META_WORDS)
      ptx::load_shared<STRIP * BLOCK_BYTES + STEP * 4 * fragment::LANES>(meta[STRIP], meta_rd + from);
  };
  auto load_b = [&]<int SLOT>(Index<SLOT>, uint32_t from) {
    constexpr int STEP = SLOT / GROUPS, GROUP = SLOT % GROUPS;
    ptx::ldmatrix_x4<GROUP * fragment::TOKENS * LINE>(b[SLOT % 2], x_rds[STEP] + from);
  };

  ptx::cp_async_wait<STAGES - 2>();
  __syncthreads();
  unroll<STRIPS>([&](auto strip) { load_a(strip, Index<0>{}, 0); });
  load_b(Index<0>{}, 0);

  // ---- Main loop: one column block a turn ----

#pragma unroll 1
  for (; left > 0; --left) {
    const bool more = left > STAGES - 1;  // whether there is a block left to copy
    const uint32_t next_stage = stage == (STAGES - 1) * STAGE_BYTES ? 0 : stage + STAGE_BYTES;

    unroll<SLOTS>([&]<int SLOT>(Index<SLOT>) {
      constexpr int STEP = SLOT / GROUPS, GROUP = SLOT % GROUPS;
      constexpr bool LAST = SLOT == SLOTS - 1;
      unroll<STRIPS>([&]<int STRIP>(Index<STRIP> strip) {
        if constexpr (STRIP == 0 && LAST) {
          ptx::cp_async_commit();
          ptx::cp_async_wait<STAGES - 2>();
          __syncthreads();  // the next stage has come for all warps, and all have read the one before this
        }
        if constexpr (STRIP == 0) load_b(Index<(SLOT + 1) % SLOTS>{}, LAST ? next_stage : stage);
        unroll<Copying::COUNT>([&]<int Q>(Index<Q> q) {
          if constexpr (copy_comes_at<Weight, TILE, LOADER>(Q, Copying::COUNT, SLOT, STRIP))
            copies.copy(q, more, column_block, false);
        });
        Weight::template mma<STEP>(sums[STRIP][GROUP], a[STRIP], b[SLOT % 2], meta[STRIP]);
        if constexpr (GROUP == GROUPS - 1)
          load_a(strip, Index<(STEP + 1) % packed::STEPS>{}, LAST ? next_stage : stage);
      });
    });

    copies.go_to(1);
    ++column_block;
    copies.wr += stage == 0 ? uint32_t(-(STAGES - 1) * STAGE_BYTES) : STAGE_BYTES;
    stage = next_stage;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // the ring is free

  // ---- Store: a warp turns 32 tokens at a time through shared memory, so that lanes lie along the features ----

  constexpr int TURNED = 4;                  // groups of eight tokens; fewer would repeat the epilogue's code
  constexpr int PITCH = TILE.warp_rows + 4;  // words of a token
  constexpr int QUADS = TILE.warp_rows / QUAD;
  static_assert(2 * PITCH % 32 == 8, "lanes of a quad step by two tokens, and must be eight banks apart");
  static_assert(GROUPS % TURNED == 0, "a warp's tokens are a multiple of 32");
  static_assert(TILE.threads() / 32 * TURNED * fragment::TOKENS * PITCH * 4 <= TILE.shared_bytes(Weight::BITS),
                "what the warps store through must fit into the ring");
  const Position<TILE> to(arguments.row_blocks);  // anew: no register holds it through the loop
  Sum* const turned = reinterpret_cast<Sum*>(ring_bytes) + to.warp * TURNED * fragment::TOKENS * PITCH;
  const int first_feature = to.row_block * packed::BLOCK_ROWS + to.warp_row;
  const int own_feature = to.row_tile * TILE.rows;  // those before it are the tile's before

#pragma unroll
  for (int first_group = 0; first_group < GROUPS; first_group += TURNED) {
    __syncwarp();
#pragma unroll
    for (int group = 0; group < TURNED; ++group)
#pragma unroll
      for (int strip = 0; strip < STRIPS; ++strip)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const fragment::Place place = fragment::d(to.lane, i);
          turned[(group * fragment::TOKENS + place.column) * PITCH + strip * fragment::ROWS + place.row] =
              sums[strip][first_group + group][i];
        }
    __syncwarp();
    const int first_token = to.first_token + to.warp_token + first_group * fragment::TOKENS;
#pragma unroll 1
    for (int quad = to.lane; quad < TURNED * fragment::TOKENS * QUADS; quad += 32) {
      const int token = quad / QUADS, feature = quad % QUADS * QUAD;
      Sum four[QUAD];
      *reinterpret_cast<uint4*>(four) = *reinterpret_cast<const uint4*>(turned + token * PITCH + feature);
      if (first_feature + feature >= own_feature) store(arguments, first_token + token, first_feature + feature, four);
    }
  }
}

}  // namespace sparse24::tiles
