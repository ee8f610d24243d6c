// y = epilogue(x W^T) for up to 16 tokens: a product that is bound by reading the compressed W [N, K] once.
//
// A block makes ROWS features of TOKENS tokens. Its eight warps divide the column blocks of W (kernels/packed.cuh)
// among themselves, warp w taking every eighth from w on, and never wait for each other until their sums are added up:
//
//              warp 0  warp 1  ...  warp 7  warp 0  warp 1  ...
//     W      [ block ][ block ]...[ block ][ block ][ block ]      16 rows each; STRIPS of them, one below the other
//     x      [ slot  ][ slot  ]...[ slot  ][ slot  ][ slot  ]      TOKENS rows of SLOT_BYTES
//
// W goes from memory straight to registers: in packed form one 16-byte load a lane is the A fragment of an mma.sp. A
// warp keeps DEPTH column blocks in flight, and asks for the next as soon as it has consumed one. x goes through a ring
// of the warp's own in shared memory, by cp.async, as far ahead; through L1, as the blocks beside this one read it too.
//
// Bytes in flight. By Little's law an A100 needs 2.04 TB/s * 0.7 us / 108 = 13 KB on each multiprocessor, an H100
// 3.35 TB/s * 0.8 us / 132 = 20 KB, a B200 8 TB/s * 0.8 us / 148 = 43 KB. A warp has four blocks of 1152 bytes (8-bit
// weights: 1280) in flight, eight warps 37 KB, and a multiprocessor holds two or three blocks of threads: 74 to 110 KB.
// ptxas gives all these loads one scoreboard, so that a warp waits for all of them once a round: a part of that is
// lost.
//
// Any N, K, row stride and alignment of x: W is padded with zeros, and x is filled with zeros beyond K and tokens.
#include "epilogue.cuh"
#include "fragment.cuh"
#include "linear.cuh"
#include "linear_few.cuh"
#include "ptx.cuh"
#include "weight_type.cuh"

namespace sparse24::few {
namespace {

constexpr int BLOCKS_IN_FLIGHT = 4;                               // of W, for each warp: eight 16-byte loads a lane
constexpr int SLOT_BYTES = packed::STEPS * fragment::STEP_BYTES;  // of one token's x in one column block
constexpr int CHUNKS = SLOT_BYTES / 16;

// Where byte `byte` of token `token` lies in a slot: swizzled by 16-byte chunks, so that the eight rows of an ldmatrix,
// and the eight chunks of a token as cp.async writes them, meet all banks.
__device__ __forceinline__ int place_of(int token, int byte) {
  return token * SLOT_BYTES + (byte ^ (token % CHUNKS * 16));
}

template <class Sum>
struct alignas(16) Four {
  Sum sums[QUAD];
};

template <class Type,  // of W, weight_type.cuh
          int ROWS,    // features of a block of threads: 16, 32 or 64
          int TOKENS>  // 8 or 16
__device__ __forceinline__ void linear_few(const LinearArguments& arguments) {
  using Sum = typename Type::Sum;
  using Unit = typename Type::Unit;
  constexpr int STRIPS = ROWS / packed::BLOCK_ROWS;
  constexpr int TILES = TOKENS / fragment::TOKENS;
  constexpr int DEPTH = BLOCKS_IN_FLIGHT / STRIPS;
  constexpr int BLOCK_BYTES = packed::block_bytes(Type::BITS);
  constexpr int UNIT_BYTES = sizeof(Unit);
  constexpr int SLOT_COLUMNS = SLOT_BYTES / UNIT_BYTES;
  static_assert(packed::ROW_PADDING % ROWS == 0, "W must reach as far down as the last tile");

  // Each warp's ring; when all are done, each warp's sums.
  __shared__ union {
    alignas(128) uint8_t ring[WARPS][DEPTH][TOKENS * SLOT_BYTES];
    Sum sums[WARPS][ROWS * TOKENS];
  } shared;

  // Told to be the same in all lanes: branches on it do not diverge, and ptxas need not bring lanes together again.
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int begin = blockIdx.z * arguments.split_blocks + warp;
  const int end = min(static_cast<int>(blockIdx.z + 1) * arguments.split_blocks, arguments.column_blocks);
  const int count = (max(end - begin, 0) + WARPS - 1) / WARPS;  // of column blocks, for this warp
  const int tokens = arguments.epilogue.tokens;
  const auto* const x = static_cast<const uint8_t*>(arguments.x);
  const int64_t x_stride = tokens > 1 ? arguments.x_stride : 0;
  const bool by_words = (reinterpret_cast<uint64_t>(x) | static_cast<uint64_t>(x_stride)) % 4 == 0;
  const uint32_t ring = ptx::shared_address(shared.ring[warp]);

  // ---- W: `values` and `metadata` are this lane's parts of the next column block to ask for ----

  const int64_t next_column_block = int64_t{WARPS} * arguments.row_blocks * BLOCK_BYTES;
  const uint8_t* values =
      arguments.packed + (int64_t{begin} * arguments.row_blocks + blockIdx.x * STRIPS) * BLOCK_BYTES;
  const uint8_t* metadata = values + packed::VALUE_BYTES + lane * 4;
  values += lane * 16;

  uint4 a[DEPTH][STRIPS][packed::STEPS];
  uint32_t meta[DEPTH][STRIPS][Type::META_WORDS];

  const auto ask_weight = [&](int slot, int strip) {
#pragma unroll
    for (int step = 0; step < packed::STEPS; ++step)
      a[slot][strip][step] =
          ptx::load_streaming_16(values + strip * BLOCK_BYTES + step * (packed::VALUE_BYTES / packed::STEPS));
#pragma unroll
    for (int word = 0; word < Type::META_WORDS; ++word)
      meta[slot][strip][word] = ptx::load_streaming_4(metadata + strip * BLOCK_BYTES + word * 4 * fragment::LANES);
    if (strip == STRIPS - 1) {
      values += next_column_block;
      metadata += next_column_block;
    }
  };

  Sum sums[STRIPS][TILES][fragment::REGISTERS] = {};

  // The product, with x copied by BYTES: 16, where both rows and K are multiples of that, else 4.
  const auto accumulate = [&]<int BYTES>() {
    // ---- x: zeros where there is no token or no column ----
    //
    // LANES lanes beside each other copy one token's part of a column block. `from` is what this lane copies of its
    // first token in the next column block to ask for, `columns` how many columns there are from there on.
    constexpr int LANES = SLOT_BYTES / BYTES, TOKENS_AT_ONCE = 32 / LANES;
    const int first_token = lane / LANES, byte = lane % LANES * BYTES;
    const uint8_t* from = x + first_token * x_stride + int64_t{begin} * SLOT_BYTES + byte;
    int columns = arguments.in_features - (begin * SLOT_BYTES + byte) / UNIT_BYTES;
    const uint32_t first_to = ring + place_of(first_token, byte);

    const auto ask_x = [&](int slot) {
      if constexpr (BYTES == 16) {
#pragma unroll
        for (int token = 0; token < TOKENS; token += TOKENS_AT_ONCE) {
          static_assert(CHUNKS == 2 * TOKENS_AT_ONCE, "so many tokens on, the swizzle has the other half of a slot");
          const uint32_t swizzled = token % CHUNKS == 0 ? first_to : first_to ^ (SLOT_BYTES / 2);
          const bool present = columns > 0 && first_token + token < tokens;
          ptx::cp_async_cached_or_zeros<16>(swizzled + (slot * TOKENS + token) * SLOT_BYTES, from + token * x_stride,
                                            present);
        }
      } else {
        const int available = min(max(columns, 0), BYTES / UNIT_BYTES);
        const uint8_t* row = x + int64_t{arguments.in_features - columns} * UNIT_BYTES;  // no register held for it
#pragma unroll 1
        for (int token = 0; token < TOKENS; ++token, row += x_stride) {
          const uint32_t to = ring + slot * TOKENS * SLOT_BYTES + place_of(token, byte);
          const int present = token < tokens ? available : 0;
          if (by_words) {
            ptx::cp_async_cached<BYTES>(to, row, present * UNIT_BYTES);
          } else {
            uint32_t bits = 0;
#pragma unroll
            for (int i = 0; i < BYTES / UNIT_BYTES; ++i)
              if (i < present) bits |= uint32_t{reinterpret_cast<const Unit*>(row)[i]} << (8 * UNIT_BYTES * i);
            ptx::store_shared_4(to, bits);
          }
        }
      }
      from += WARPS * SLOT_BYTES;
      columns -= WARPS * SLOT_COLUMNS;
    };

    // ---- A group of copies is committed for every column block, and for none as well, so that groups count ----

#pragma unroll
    for (int slot = 0; slot < DEPTH; ++slot) {
      if (slot < count) {
#pragma unroll
        for (int strip = 0; strip < STRIPS; ++strip) ask_weight(slot, strip);
        ask_x(slot);
      }
      ptx::cp_async_commit();
    }
    // This lane's row for ldmatrix, of step 0; step 1 is the other half of the slot, swizzled or not.
    const uint32_t fragment_x = ring + place_of(lane % 8, lane / 8 * 16);
    for (int left = count; left > 0; left -= DEPTH) {
#pragma unroll
      for (int slot = 0; slot < DEPTH; ++slot) {
        if (slot >= left) continue;
        const bool more = slot + DEPTH < left;
        ptx::cp_async_wait<DEPTH - 1>();
        __syncwarp();  // all lanes' copies have come
        uint32_t b[packed::STEPS][TILES][fragment::REGISTERS];
#pragma unroll
        for (int step = 0; step < packed::STEPS; ++step)
#pragma unroll
          for (int tile = 0; tile < TILES; ++tile)
            ptx::ldmatrix_x4(b[step][tile], (fragment_x ^ (step * fragment::STEP_BYTES)) +
                                                (slot * TOKENS + tile * fragment::TOKENS) * SLOT_BYTES);
        __syncwarp();  // all lanes have read the slot
        if (more) ask_x(slot);
        ptx::cp_async_commit();
#pragma unroll
        for (int strip = 0; strip < STRIPS; ++strip) {
#pragma unroll
          for (int tile = 0; tile < TILES; ++tile)
            Type::template mma<0>(sums[strip][tile], a[slot][strip][0], b[0][tile], meta[slot][strip][0]);
#pragma unroll
          for (int tile = 0; tile < TILES; ++tile)
            Type::template mma<1>(sums[strip][tile], a[slot][strip][1], b[1][tile],
                                  meta[slot][strip][Type::META_WORDS - 1]);
          if (more) ask_weight(slot, strip);
        }
      }
    }
  };
  const uint64_t whole = reinterpret_cast<uint64_t>(x) | static_cast<uint64_t>(x_stride) |
                         static_cast<uint64_t>(arguments.in_features) * UNIT_BYTES;
  if (whole % 16 == 0) {
    accumulate.template operator()<16>();
  } else {
    accumulate.template operator()<4>();
  }

  // ---- The sums of all warps, in the order of warps ----
  //
  // Features lie beside each other. Bits 3 and 4 of an index are flipped by bits 1 and 2 of the token, so that a warp's
  // stores of a fragment, 8 features of 4 pairs of tokens, meet all banks; 32 indices in a row do anyway.
  const auto index_of = [](int index) { return index ^ (index / (2 * ROWS) % 4 * 8); };

  __syncthreads();  // the rings are done with
#pragma unroll
  for (int strip = 0; strip < STRIPS; ++strip)
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int i = 0; i < fragment::REGISTERS; ++i) {
        const fragment::Place place = fragment::d(lane, i);
        const int row = strip * packed::BLOCK_ROWS + place.row, token = tile * fragment::TOKENS + place.column;
        shared.sums[warp][index_of(token * ROWS + row)] = sums[strip][tile][i];
      }
  __syncthreads();  // all sums are there

  // Four features of one token a thread.
  constexpr int SUMS = ROWS * TOKENS;
  static_assert(SUMS <= QUAD * THREADS, "each thread finishes four sums at most");
  const int index = QUAD * threadIdx.x;
  if (index >= SUMS) return;
  Sum total[QUAD] = {};
#pragma unroll
  for (int other = 0; other < WARPS; ++other) {
    const auto four = *reinterpret_cast<const Four<Sum>*>(&shared.sums[other][index_of(index)]);
#pragma unroll
    for (int i = 0; i < QUAD; ++i) total[i] += four.sums[i];
  }
  store(arguments, index / ROWS, blockIdx.x * ROWS + index % ROWS, total);
}

}  // namespace

// BLOCKS: how many a multiprocessor should hold, which bounds the registers.
#define SPARSE24_FEW(NAME, TYPE, ROWS, TOKENS, BLOCKS)                                           \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                  \
      linear_few_##NAME##_##ROWS##x##TOKENS(const __grid_constant__ LinearArguments arguments) { \
    linear_few<TYPE, ROWS, TOKENS>(arguments);                                                   \
  }
#define SPARSE24_FEW_TILES(NAME, TYPE, BLOCKS_32x8) \
  SPARSE24_FEW(NAME, TYPE, 16, 8, 3)                \
  SPARSE24_FEW(NAME, TYPE, 32, 8, BLOCKS_32x8)      \
  SPARSE24_FEW(NAME, TYPE, 32, 16, 2)               \
  SPARSE24_FEW(NAME, TYPE, 64, 16, 2)

SPARSE24_FEW_TILES(f16, F16Weight, 3)
SPARSE24_FEW_TILES(bf16, BF16Weight, 3)
SPARSE24_FEW_TILES(s8, I8Weight, 2)  // 3 would spill on sm_90a, and elsewhere it takes no more registers than that

}  // namespace sparse24::few
