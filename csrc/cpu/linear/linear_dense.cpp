// x, W and the epilogue of a dense product: the choice of the ISA, and the kernels in plain C++.
#include "csrc/cpu/linear/linear_dense.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>
#include <type_traits>

#include "csrc/cpu/half.h"
#include "csrc/cpu/isa.h"
#include "csrc/cpu/linear/linear_choice.h"
#include "csrc/cpu/parallel.h"

namespace sparse24::cpu {
namespace {

// ---- W ----

// The value in `slot` of `row` of a chunk.
template <Element WEIGHT, class Value>
SPARSE24_INLINE Value value_at(const uint8_t* values, int slot, int row) {
  if constexpr (is_int4(WEIGHT)) {
    const int byte = values[(slot / 8 * BLOCK_ROWS + row) * 4 + slot % 4];
    return static_cast<Value>(static_cast<int8_t>(byte << (slot / 4 % 2 == 0 ? 4 : 0)) >> 4);
  } else {
    constexpr int LANE = lane_values(WEIGHT), SIZE = element_bits(WEIGHT) / 8;
    const uint8_t* const at = values + ((slot / LANE * BLOCK_ROWS + row) * LANE + slot % LANE) * SIZE;
    if constexpr (WEIGHT == Element::I8) return static_cast<Value>(static_cast<int8_t>(*at));
    uint32_t bits = 0;
    std::memcpy(&bits, at, SIZE);
    if constexpr (std::is_same_v<Value, uint16_t>) return static_cast<uint16_t>(bits);
    if constexpr (WEIGHT == Element::F16) return f16_to_float(static_cast<uint16_t>(bits));
    if constexpr (WEIGHT == Element::BF16) bits <<= 16;
    return std::bit_cast<float>(bits);
  }
}

template <Element WEIGHT, class Value>
void decode_block(const Linear& call, int64_t block, Value* rows, int64_t stride) {
  constexpr int UNIT = group_columns(pattern_of(WEIGHT)) / 4;  // columns
  const uint8_t* chunk = call.packed + block * block_bytes(call);
  const uint8_t* const end = chunk + chunk_count(WEIGHT, call.in_features) * chunk_bytes(WEIGHT);
  for (; chunk < end; chunk += chunk_bytes(WEIGHT), rows += chunk_columns(WEIGHT)) {
    for (int row = 0; row < BLOCK_ROWS; ++row) {
      Value* const columns = rows + row * stride;
      std::fill(columns, columns + chunk_columns(WEIGHT), Value{});
      for (int slot = 0; slot < chunk_columns(WEIGHT) / 2; ++slot) {
        const int unit = slot / UNIT;  // two of them a group, sixteen in each uint32 of codes
        const int codes = chunk[unit / 16 * CODES_BYTES + row * 4 + unit / 4 % 4];
        const int column = (unit / 2 * 4 + (codes >> unit % 4 * 2 & 3)) * UNIT + slot % UNIT;
        columns[column] = value_at<WEIGHT, Value>(chunk + chunk_codes_bytes(WEIGHT), slot, row);
      }
    }
  }
}

void decode_floats(const Linear& call, int64_t block, float* rows, int64_t stride) {
  switch (call.weight) {
    case Element::F32:
      return decode_block<Element::F32>(call, block, rows, stride);
    case Element::F16:
      return decode_block<Element::F16>(call, block, rows, stride);
    case Element::BF16:
      return decode_block<Element::BF16>(call, block, rows, stride);
    case Element::I8:
      return decode_block<Element::I8>(call, block, rows, stride);
    case Element::I4:
      return decode_block<Element::I4>(call, block, rows, stride);
    default:
      return decode_block<Element::I4_TWO_FOUR>(call, block, rows, stride);
  }
}

void decode_bf16(const Linear& call, int64_t block, uint16_t* rows, int64_t stride) {
  decode_block<Element::BF16>(call, block, rows, stride);
}

void decode_int8(const Linear& call, int64_t block, int8_t* rows, int64_t stride) {
  if (call.weight == Element::I8) return decode_block<Element::I8>(call, block, rows, stride);
  decode_block<Element::I4>(call, block, rows, stride);
}

// ---- x ----

// Whether no element of [0, count) has all bits of EXPONENT set. Loops without an exit, which become vectors.
template <class Bits, Bits EXPONENT>
bool finite_row(const void* row, int64_t count) {
  const auto elements = static_cast<const Bits*>(row);
  Bits special = 0;
  for (int64_t i = 0; i < count; ++i) special |= static_cast<Bits>((elements[i] & EXPONENT) == EXPONENT);
  return special == 0;
}

}  // namespace

const DenseDecode PORTABLE_DECODE{decode_floats, decode_bf16, decode_int8};
const DenseFinish PORTABLE_FINISH{portable_finish, portable_finish};

const DenseDecode& dense_decode() {
#if defined(__x86_64__)
  if (active_isa() >= Isa::AVX2) return AVX2_DECODE;
#endif
  return PORTABLE_DECODE;
}

const DenseFinish& dense_finish() {
#if defined(__x86_64__)
  if (active_isa() >= Isa::AVX512) return AVX512_FINISH;
#endif
  return PORTABLE_FINISH;
}

bool has_exact_int8_product() {
#if defined(__x86_64__)
  return active_isa() >= Isa::AVX512;
#else
  return false;
#endif
}

bool has_bf16_product() {
#if defined(__x86_64__)
  return active_isa() >= Isa::AVX512_BF16;
#else
  return false;
#endif
}

bool all_finite(const Linear& call) {
  const int64_t row_bytes = call.x_stride * element_bits(call.x_element) / 8;
  for (int64_t token = 0; token < call.epilogue.tokens; ++token) {
    const void* const row = static_cast<const uint8_t*>(call.x) + token * row_bytes;
    const bool finite = call.x_element == Element::F32   ? finite_row<uint32_t, 0x7f800000>(row, call.in_features)
                        : call.x_element == Element::F16 ? finite_row<uint16_t, 0x7c00>(row, call.in_features)
                                                         : finite_row<uint16_t, 0x7f80>(row, call.in_features);
    if (!finite) return false;
  }
  return true;
}

void prepare_x(const Linear& call, int64_t first, int64_t last, Element element, void* rows, float* x_scales) {
  const bool quantized = is_integer(call.weight) && !call.weight_only;
  const Element panel_element = quantized ? Element::I8 : element;
  const Kernels& kernels = packing_kernels(call.weight, call.weight_only, call.x_element, panel_element);
  const int64_t columns = dense_columns(call), x_row_bytes = call.x_stride * element_bits(call.x_element) / 8;
  const int64_t row_bytes = columns * element_bits(element) / 8;
  const auto prepare = [&](int64_t begin, int64_t end) {
    std::unique_ptr<uint8_t[]> offset_row;
    for (int64_t token = begin; token < end; ++token) {
      const void* const x = static_cast<const uint8_t*>(call.x) + token * x_row_bytes;
      const auto row = static_cast<uint8_t*>(rows) + (token - first) * row_bytes;
      // A panel of one row is that row.
      uint8_t* panel = row;
      if (quantized && element == Element::F32) {
        if (!offset_row) offset_row = std::make_unique<uint8_t[]>(columns + UNIT_BYTES);
        panel = offset_row.get() + (-reinterpret_cast<uintptr_t>(offset_row.get())) % UNIT_BYTES;
      }
      kernels.pack({&x, 1, call.x_element, call.in_features, columns, panel, 1, 0, x_scales + (token - first)});
      if (!quantized) continue;
      if (element == Element::F32) {
        for (int64_t k = 0; k < columns; ++k) reinterpret_cast<float*>(row)[k] = static_cast<float>(panel[k] - 128);
      } else {
        for (int64_t k = 0; k < columns; ++k) row[k] ^= 0x80;
      }
      const Epilogue& epilogue = call.epilogue;
      if (call.x_element == Element::I8 && epilogue.x_scales) {
        x_scales[token - first] = epilogue.x_scales[token * epilogue.x_scale_step];
      }
    }
  };
  constexpr int64_t GRAIN_ELEMENTS = 65536;
  parallel_for(first, last, GRAIN_ELEMENTS / (columns + 1) + 1, prepare);
}

void finish_dense(const Linear& call, int64_t first, int64_t last, int64_t first_block, int64_t last_block,
                  Number sum_type, const void* sums, int64_t stride, const float* x_scales) {
  const DenseFinish& finish = dense_finish();
  const bool quantized = is_integer(call.weight) && !call.weight_only;
  const auto finish_tile = [&](int64_t begin, int64_t end, int64_t block) {
    const Tile tile{.panel = nullptr,
                    .x_scales = quantized ? x_scales + (begin - first) : nullptr,
                    .first_token = begin,
                    .rows = static_cast<int>(end - begin),
                    .panel_rows = static_cast<int>(end - begin),
                    .first_block = block,
                    .last_block = block + 1};
    const int64_t at = (begin - first) * stride + (block - first_block) * BLOCK_ROWS;
    if (sum_type == Number::I32) {
      // As a panel of int8 has them: shifted, with the compensation.
      uint32_t compensation[BLOCK_ROWS];
      std::memcpy(compensation, compensation_of(call, block, 0), COMPENSATION_BYTES);
      alignas(UNIT_BYTES) int32_t tile_sums[PANEL_ROWS][BLOCK_ROWS];
      for (int row = 0; row < tile.rows; ++row) {
        const auto from = static_cast<const int32_t*>(sums) + at + row * stride;
        for (int n = 0; n < BLOCK_ROWS; ++n) {
          tile_sums[row][n] =
              static_cast<int32_t>((static_cast<uint32_t>(from[n]) << sum_shift(call.weight)) + compensation[n]);
        }
      }
      return finish.integers(call, tile, block, &tile_sums[0][0]);
    }
    alignas(UNIT_BYTES) float tile_sums[PANEL_ROWS][BLOCK_ROWS];
    for (int row = 0; row < tile.rows; ++row) {
      if (sum_type == Number::F32) {
        std::memcpy(tile_sums[row], static_cast<const float*>(sums) + at + row * stride, sizeof tile_sums[row]);
      } else {
        const auto from = static_cast<const uint16_t*>(sums) + at + row * stride;
        for (int n = 0; n < BLOCK_ROWS; ++n) {
          tile_sums[row][n] = std::bit_cast<float>(static_cast<uint32_t>(from[n]) << 16);
        }
      }
    }
    finish.floats(call, tile, block, &tile_sums[0][0]);
  };
  const auto finish_tokens = [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; token += PANEL_ROWS) {
      for (int64_t block = first_block; block < last_block; ++block) {
        finish_tile(token, std::min<int64_t>(token + PANEL_ROWS, end), block);
      }
    }
  };
  constexpr int64_t GRAIN_SUMS = 16384;
  parallel_for(first, last, GRAIN_SUMS / ((last_block - first_block) * BLOCK_ROWS) + 1, finish_tokens);
}

}  // namespace sparse24::cpu
