// The packed form of the CPU linear family (linear_kernels.h): canonical to packed and back, by moving bytes.
#include <algorithm>
#include <cstring>

#include "csrc/cpu/linear/linear_kernels.h"
#include "csrc/cpu/parallel.h"

namespace sparse24::cpu {

namespace {

// Byte offset, in a chunk, of the value in `slot` of `row`; of an int4 value the byte that holds it.
template <Element ELEMENT>
SPARSE24_INLINE int value_offset(int slot, int row) {
  constexpr int LANE = lane_values(ELEMENT);
  if (is_int4(ELEMENT)) {
    return chunk_codes_bytes(ELEMENT) + (slot / (2 * LANE) * BLOCK_ROWS + row) * LANE + slot % LANE;
  }
  return chunk_codes_bytes(ELEMENT) +
         ((slot / LANE * BLOCK_ROWS + row) * LANE + slot % LANE) * element_bits(ELEMENT) / 8;
}

// Byte offset, in a chunk, of the codes of groups 2 * `pair` and 2 * `pair` + 1 of `row`.
SPARSE24_INLINE int codes_offset(int pair, int row) { return pair / 4 * CODES_BYTES + row * 4 + pair % 4; }

// Calls move_value(index, packed, chunk, slot, row) and move_codes(index, packed) for every value and every pair of
// codes of a block, which begins at `begin`: the index in the canonical array, and the offset in the packed form.
template <Element ELEMENT, class MoveValue, class MoveCodes>
void for_each_in_block(int64_t block, int64_t begin, int64_t out_features, int64_t in_features,
                       const MoveValue& move_value, const MoveCodes& move_codes) {
  constexpr Pattern PATTERN = pattern_of(ELEMENT);
  constexpr int SLOTS = chunk_columns(ELEMENT) / 2, PAIRS = chunk_columns(ELEMENT) / group_columns(PATTERN) / 2;
  const int64_t row_values = group_columns(PATTERN) / 2 * group_count(PATTERN, in_features);
  const int64_t row_meta = meta_row_bytes(PATTERN, in_features);
  const int rows = static_cast<int>(std::min<int64_t>(BLOCK_ROWS, out_features - block * BLOCK_ROWS));
  for (int64_t chunk = 0; chunk < chunk_count(ELEMENT, in_features); ++chunk) {
    const int64_t at = begin + chunk * chunk_bytes(ELEMENT);
    const int slots = static_cast<int>(std::min<int64_t>(SLOTS, row_values - chunk * SLOTS));
    const int pairs = static_cast<int>(std::min<int64_t>(PAIRS, row_meta - chunk * PAIRS));
    for (int row = 0; row < rows; ++row) {
      const int64_t n = block * BLOCK_ROWS + row;
      for (int slot = 0; slot < slots; ++slot) {
        move_value(n * row_values + chunk * SLOTS + slot, at + value_offset<ELEMENT>(slot, row), chunk, slot, row);
      }
      for (int pair = 0; pair < pairs; ++pair) {
        move_codes(n * row_meta + chunk * PAIRS + pair, at + codes_offset(pair, row));
      }
    }
  }
}

// Which half of its packed byte an int4 value lies in, as a shift. Its canonical byte has the even index low.
constexpr int packed_shift(int slot) { return slot / 4 % 2 * 4; }
constexpr int canonical_shift(int64_t index) { return static_cast<int>(index % 2) * 4; }

int32_t int4_at(const uint8_t* values, int64_t index) {
  return static_cast<int8_t>(values[index / 2] << (4 - canonical_shift(index))) >> 4;
}

template <Element ELEMENT>
void pack_blocks(const uint8_t* values, const uint8_t* meta, int64_t out_features, int64_t in_features,
                 int64_t group_size, uint8_t* packed) {
  constexpr int SIZE = element_bits(ELEMENT) / 8;
  const int64_t bytes = block_bytes(ELEMENT, in_features, group_size);
  const int64_t chunks = chunk_count(ELEMENT, in_features);
  const int64_t group_chunks = group_size ? group_size / chunk_columns(ELEMENT) : std::max<int64_t>(chunks, 1);
  parallel_for(0, block_count(out_features), 1, [&](int64_t first, int64_t last) {
    std::memset(packed + first * bytes, 0, (last - first) * bytes);
    for (int64_t block = first; block < last; ++block) {
      const auto compensate = [&](int64_t chunk, int row, int32_t value) {
        if constexpr (is_compensated(ELEMENT)) {
          uint8_t* const at = packed + block * bytes + chunks * chunk_bytes(ELEMENT) +
                              chunk / group_chunks * COMPENSATION_BYTES + row * 4;
          uint32_t sum;
          std::memcpy(&sum, at, sizeof sum);
          sum += static_cast<uint32_t>(value) * compensation_factor(ELEMENT);
          std::memcpy(at, &sum, sizeof sum);
        }
      };
      for_each_in_block<ELEMENT>(
          block, block * bytes, out_features, in_features,
          [&](int64_t index, int64_t at, int64_t chunk, int slot, int row) {
            if constexpr (is_int4(ELEMENT)) {
              const int32_t value = int4_at(values, index);
              packed[at] |= static_cast<uint8_t>((value & 15) << packed_shift(slot));
              compensate(chunk, row, value);
            } else {
              std::memcpy(packed + at, values + index * SIZE, SIZE);
              if (ELEMENT == Element::I8) compensate(chunk, row, static_cast<int8_t>(values[index]));
            }
          },
          [&](int64_t index, int64_t at) { packed[at] = meta[index]; });
    }
  });
  std::memset(packed + block_count(out_features) * bytes, 0, PACKED_TAIL_BYTES);
}

template <Element ELEMENT>
void unpack_blocks(const uint8_t* packed, int64_t out_features, int64_t in_features, int64_t group_size,
                   uint8_t* values, uint8_t* meta) {
  constexpr int SIZE = element_bits(ELEMENT) / 8;
  const int64_t bytes = block_bytes(ELEMENT, in_features, group_size);
  parallel_for(0, block_count(out_features), 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      for_each_in_block<ELEMENT>(
          block, block * bytes, out_features, in_features,
          [&](int64_t index, int64_t at, int64_t, int slot, int) {
            if constexpr (is_int4(ELEMENT)) {  // in order: the even index first, which clears the byte
              const int value = packed[at] >> packed_shift(slot) & 15, shift = canonical_shift(index);
              values[index / 2] = static_cast<uint8_t>((shift ? values[index / 2] : 0) | value << shift);
            } else {
              std::memcpy(values + index * SIZE, packed + at, SIZE);
            }
          },
          [&](int64_t index, int64_t at) { meta[index] = packed[at]; });
    }
  });
}

// Calls run.operator()<ELEMENT>() for the weight's element type.
template <class Run>
void for_element(Element weight, const Run& run) {
  switch (weight) {
    case Element::F32:
      return run.template operator()<Element::F32>();
    case Element::F16:
      return run.template operator()<Element::F16>();
    case Element::BF16:
      return run.template operator()<Element::BF16>();
    case Element::I8:
      return run.template operator()<Element::I8>();
    case Element::I4:
      return run.template operator()<Element::I4>();
    default:
      return run.template operator()<Element::I4_TWO_FOUR>();
  }
}

}  // namespace

int64_t packed_bytes(Element weight, int64_t out_features, int64_t in_features, int64_t group_size) {
  return block_count(out_features) * block_bytes(weight, in_features, group_size) + PACKED_TAIL_BYTES;
}

void pack(const void* values, const uint8_t* meta, Element weight, int64_t out_features, int64_t in_features,
          uint8_t* packed, int64_t group_size) {
  for_element(weight, [&]<Element ELEMENT>() {
    pack_blocks<ELEMENT>(static_cast<const uint8_t*>(values), meta, out_features, in_features, group_size, packed);
  });
}

void unpack(const uint8_t* packed, Element weight, int64_t out_features, int64_t in_features, void* values,
            uint8_t* meta, int64_t group_size) {
  for_element(weight, [&]<Element ELEMENT>() {
    unpack_blocks<ELEMENT>(packed, out_features, in_features, group_size, static_cast<uint8_t*>(values), meta);
  });
}

}  // namespace sparse24::cpu
