// The packed form of the CPU linear family (linear_kernels.h): canonical to packed and back, by moving bytes.
#include <algorithm>
#include <cstring>

#include "csrc/cpu/linear_kernels.h"
#include "csrc/cpu/parallel.h"

namespace sparse24::cpu {

namespace {

// Byte offset, in a chunk, of the value in `slot` of `row`.
template <Element ELEMENT>
SPARSE24_INLINE int value_offset(int slot, int row) {
  constexpr int LANE = lane_values(ELEMENT);
  return chunk_codes_bytes(ELEMENT) +
         ((slot / LANE * BLOCK_ROWS + row) * LANE + slot % LANE) * element_bits(ELEMENT) / 8;
}

// Byte offset, in a chunk, of the codes of groups 2 * `pair` and 2 * `pair` + 1 of `row`.
SPARSE24_INLINE int codes_offset(int pair, int row) { return pair / 4 * CODES_BYTES + row * 4 + pair % 4; }

// Calls move(canonical, packed) for every value and every pair of codes of block `block`, as (row's array, index) and
// pointer into the packed form.
template <Element ELEMENT, class MoveValue, class MoveCodes>
void for_each_in_block(int64_t block, int64_t out_features, int64_t in_features, const MoveValue& move_value,
                       const MoveCodes& move_codes) {
  constexpr int SLOTS = chunk_columns(ELEMENT) / 2, PAIRS = chunk_columns(ELEMENT) / 8;
  const int64_t row_values = 2 * group_count(Pattern::TWO_FOUR, in_features);
  const int64_t row_meta = meta_row_bytes(Pattern::TWO_FOUR, in_features);
  const int rows = static_cast<int>(std::min<int64_t>(BLOCK_ROWS, out_features - block * BLOCK_ROWS));
  for (int64_t chunk = 0; chunk < chunk_count(ELEMENT, in_features); ++chunk) {
    const int64_t at = block * block_bytes(ELEMENT, in_features) + chunk * chunk_bytes(ELEMENT);
    const int slots = static_cast<int>(std::min<int64_t>(SLOTS, row_values - chunk * SLOTS));
    const int pairs = static_cast<int>(std::min<int64_t>(PAIRS, row_meta - chunk * PAIRS));
    for (int row = 0; row < rows; ++row) {
      const int64_t n = block * BLOCK_ROWS + row;
      for (int slot = 0; slot < slots; ++slot) {
        move_value(n * row_values + chunk * SLOTS + slot, at + value_offset<ELEMENT>(slot, row), row);
      }
      for (int pair = 0; pair < pairs; ++pair) {
        move_codes(n * row_meta + chunk * PAIRS + pair, at + codes_offset(pair, row));
      }
    }
  }
}

template <Element ELEMENT>
void pack_blocks(const uint8_t* values, const uint8_t* meta, int64_t out_features, int64_t in_features,
                 uint8_t* packed) {
  constexpr int SIZE = element_bits(ELEMENT) / 8;
  const int64_t bytes = block_bytes(ELEMENT, in_features);
  parallel_for(0, block_count(out_features), 1, [&](int64_t first, int64_t last) {
    std::memset(packed + first * bytes, 0, (last - first) * bytes);
    for (int64_t block = first; block < last; ++block) {
      uint32_t compensation[BLOCK_ROWS] = {};
      for_each_in_block<ELEMENT>(
          block, out_features, in_features,
          [&](int64_t canonical, int64_t at, int row) {
            std::memcpy(packed + at, values + canonical * SIZE, SIZE);
            if (ELEMENT == Element::I8) compensation[row] += 128u * static_cast<uint32_t>(int8_t(values[canonical]));
          },
          [&](int64_t canonical, int64_t at) { packed[at] = meta[canonical]; });
      if (ELEMENT == Element::I8) {
        std::memcpy(packed + (block + 1) * bytes - COMPENSATION_BYTES, compensation, COMPENSATION_BYTES);
      }
    }
  });
  std::memset(packed + block_count(out_features) * bytes, 0, PACKED_TAIL_BYTES);
}

template <Element ELEMENT>
void unpack_blocks(const uint8_t* packed, int64_t out_features, int64_t in_features, uint8_t* values, uint8_t* meta) {
  constexpr int SIZE = element_bits(ELEMENT) / 8;
  parallel_for(0, block_count(out_features), 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      for_each_in_block<ELEMENT>(
          block, out_features, in_features,
          [&](int64_t canonical, int64_t at, int) { std::memcpy(values + canonical * SIZE, packed + at, SIZE); },
          [&](int64_t canonical, int64_t at) { meta[canonical] = packed[at]; });
    }
  });
}

}  // namespace

int64_t packed_bytes(Element element, int64_t out_features, int64_t in_features) {
  return block_count(out_features) * block_bytes(element, in_features) + PACKED_TAIL_BYTES;
}

void pack(const void* values, const uint8_t* meta, Element element, int64_t out_features, int64_t in_features,
          uint8_t* packed) {
  const auto bytes = static_cast<const uint8_t*>(values);
  switch (element) {
    case Element::F32:
      return pack_blocks<Element::F32>(bytes, meta, out_features, in_features, packed);
    case Element::F16:
      return pack_blocks<Element::F16>(bytes, meta, out_features, in_features, packed);
    case Element::BF16:
      return pack_blocks<Element::BF16>(bytes, meta, out_features, in_features, packed);
    default:
      return pack_blocks<Element::I8>(bytes, meta, out_features, in_features, packed);
  }
}

void unpack(const uint8_t* packed, Element element, int64_t out_features, int64_t in_features, void* values,
            uint8_t* meta) {
  const auto bytes = static_cast<uint8_t*>(values);
  switch (element) {
    case Element::F32:
      return unpack_blocks<Element::F32>(packed, out_features, in_features, bytes, meta);
    case Element::F16:
      return unpack_blocks<Element::F16>(packed, out_features, in_features, bytes, meta);
    case Element::BF16:
      return unpack_blocks<Element::BF16>(packed, out_features, in_features, bytes, meta);
    default:
      return unpack_blocks<Element::I8>(packed, out_features, in_features, bytes, meta);
  }
}

}  // namespace sparse24::cpu
