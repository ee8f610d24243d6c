// Canonical form <-> the packed form of packed.cuh. One thread moves one 32-bit word of a block of packed.
//
// Grid: x = ceil(words of all blocks / THREADS). Words of a block lie beside each other in memory, and come from 16
// rows of the canonical form, 64 bytes of each. Codes are moved as they are: illegal ones cost wrong numbers later, and
// no address depends on them.
#include "linear.cuh"
#include "pack.cuh"
#include "packed.cuh"

namespace sparse24::packed {
namespace {

enum class Direction { PACK, UNPACK };

// One byte of the canonical form, or what stands for it beyond the matrix.
template <Direction DIRECTION>
__device__ __forceinline__ void move(uint8_t* canonical, bool inside, uint8_t padding, uint32_t& word, int shift) {
  if constexpr (DIRECTION == Direction::PACK) {
    word |= uint32_t{inside ? *canonical : padding} << shift;
  } else {
    if (inside) *canonical = static_cast<uint8_t>(word >> shift);
  }
}

// A byte of metadata. The second code of a row's last byte may be none: 0 in the canonical form, FILLER here.
template <Direction DIRECTION>
__device__ __forceinline__ void move_meta(const PackArguments& arguments, int64_t row, int64_t byte, uint32_t& word,
                                          int shift) {
  const int64_t groups = (arguments.in_features + 3) / 4, row_bytes = (groups + 1) / 2;
  const bool inside = row < arguments.out_features && byte < row_bytes;
  const bool half = inside && 2 * byte + 1 == groups;
  if (DIRECTION == Direction::UNPACK && half) word &= ~(0xf0u << shift);
  move<DIRECTION>(arguments.meta + row * row_bytes + byte, inside, FILLER * 0x11, word, shift);
  if (DIRECTION == Direction::PACK && half) word |= uint32_t{FILLER} << (shift + 4);
}

template <int BITS, Direction DIRECTION>
__device__ __forceinline__ void move_word(const PackArguments& arguments) {
  constexpr int BLOCK_WORDS = block_bytes(BITS) / 4, VALUE_WORDS = VALUE_BYTES / 4;
  constexpr int ROW_VALUES = STEPS * STEP_VALUE_BYTES, ROW_META = meta_bytes(BITS) / BLOCK_ROWS;  // bytes of a block
  const int64_t rows = row_blocks(arguments.out_features);
  const int64_t words = rows * column_blocks(BITS, arguments.in_features) * BLOCK_WORDS;
  const int64_t index = int64_t{blockIdx.x} * THREADS + threadIdx.x;
  if (index >= words) return;

  const int64_t block = index / BLOCK_WORDS;
  const int64_t first_row = block % rows * BLOCK_ROWS, column_block = block / rows;
  const int in_block = static_cast<int>(index % BLOCK_WORDS);
  uint32_t* const packed = reinterpret_cast<uint32_t*>(arguments.packed) + index;
  uint32_t word = DIRECTION == Direction::PACK ? 0 : *packed;

  if (in_block < VALUE_WORDS) {
    const Place place = value_word(in_block);
    const int64_t row = first_row + place.row, row_bytes = (arguments.in_features + 3) / 4 * 2 * (BITS / 8);
    const int64_t byte = column_block * ROW_VALUES + place.column;
    uint8_t* const values = static_cast<uint8_t*>(arguments.values) + row * row_bytes + byte;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      move<DIRECTION>(values + i, row < arguments.out_features && byte + i < row_bytes, 0, word, 8 * i);
  } else if constexpr (BITS == 16) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Place place = meta_half_word(in_block - VALUE_WORDS, half);
#pragma unroll
      for (int i = 0; i < 2; ++i)
        move_meta<DIRECTION>(arguments, first_row + place.row, column_block * ROW_META + place.column + i, word,
                             16 * half + 8 * i);
    }
  } else {
    const Place place = meta_word(in_block - VALUE_WORDS);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      move_meta<DIRECTION>(arguments, first_row + place.row, column_block * ROW_META + place.column + i, word, 8 * i);
  }
  if (DIRECTION == Direction::PACK) *packed = word;
}

}  // namespace
}  // namespace sparse24::packed

#define SPARSE24_PACK(NAME, BITS, DIRECTION)                                                   \
  extern "C" __global__ void NAME(const __grid_constant__ sparse24::PackArguments arguments) { \
    sparse24::packed::move_word<BITS, sparse24::packed::Direction::DIRECTION>(arguments);      \
  }
SPARSE24_PACK(pack_b16, 16, PACK)
SPARSE24_PACK(pack_b8, 8, PACK)
SPARSE24_PACK(unpack_b16, 16, UNPACK)
SPARSE24_PACK(unpack_b8, 8, UNPACK)
#undef SPARSE24_PACK
