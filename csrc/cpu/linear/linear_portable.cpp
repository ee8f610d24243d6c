// linear() in plain C++: the same packed form, panels and rounding as the vector kernels.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "csrc/cpu/half.h"
#include "csrc/cpu/linear/linear_kernels.h"

namespace sparse24::cpu {
namespace {

// ---- Elements ----

float load_float(const void* array, Element element, int64_t index) {
  if (element == Element::F32) return static_cast<const float*>(array)[index];
  const uint16_t half = static_cast<const uint16_t*>(array)[index];
  return element == Element::F16 ? f16_to_float(half) : bf16_to_float(half);
}

void store_float(void* array, Element element, int64_t index, float value) {
  if (element == Element::F32) {
    static_cast<float*>(array)[index] = value;
  } else {
    static_cast<uint16_t*>(array)[index] = element == Element::F16 ? float_to_f16(value) : float_to_bf16(value);
  }
}

// ---- Activations, in double ----

float activate(Activation activation, float value) {
  const double x = value;
  switch (activation) {
    case Activation::RELU:
      return value < 0 ? 0 : value;
    case Activation::GELU:
      return static_cast<float>(x * 0.5 * std::erfc(x * -0.70710678118654752));
    case Activation::GELU_TANH:
      return static_cast<float>(x / (1 + std::exp(-1.5957691216057308 * (x + 0.044715 * x * x * x))));
    case Activation::SILU:
      return static_cast<float>(x / (1 + std::exp(-x)));
    default:
      return value;
  }
}

// ---- Rows of x ----

// Where column k of a row lies in a panel.
template <class Value>
Value* column_of(const Strip& strip, int row, int64_t k) {
  constexpr int64_t UNIT = UNIT_BYTES / sizeof(Value);
  return reinterpret_cast<Value*>(strip.panel + (k / UNIT * strip.panel_rows + strip.row + row) * UNIT_BYTES) +
         k % UNIT;
}

// As floats; for BF16 weights rounded to bfloat16, as every instruction set does.
template <bool ROUND_TO_BF16>
void pack_floats(const Strip& strip) {
  for (int row = 0; row < strip.count; ++row) {
    for (int64_t k = 0; k < strip.columns; ++k) {
      float value = k < strip.in_features ? load_float(strip.rows[row], strip.x_element, k) : 0;
      if (ROUND_TO_BF16) value = bf16_to_float(float_to_bf16(value));
      *column_of<float>(strip, row, k) = value;
    }
  }
}

// s = amax / 127, q = clamp(round-to-nearest-even(x / s), -127, 127), stored as q + 128. A row with an Inf or a NaN
// gets the scale NaN; one whose amax / 127 is 0 gets the scale 1.
void quantize_rows(const Strip& strip) {
  for (int row = 0; row < strip.count; ++row) {
    const void* const x = strip.rows[row];
    float amax = 0;
    bool finite = true;
    for (int64_t k = 0; k < strip.in_features; ++k) {
      const float magnitude = std::fabs(load_float(x, strip.x_element, k));
      finite = finite && magnitude <= std::numeric_limits<float>::max();
      amax = std::max(amax, magnitude);
    }
    float scale = finite ? amax / 127 : std::numeric_limits<float>::quiet_NaN();
    if (scale == 0) scale = 1;
    for (int64_t k = 0; k < strip.columns; ++k) {
      float q = 0;
      if (finite && k < strip.in_features) q = std::nearbyint(load_float(x, strip.x_element, k) / scale);
      *column_of<uint8_t>(strip, row, k) = static_cast<uint8_t>(static_cast<int>(std::clamp(q, -127.0f, 127.0f)) + 128);
    }
    strip.scales[row] = scale;
  }
}

// int8 as it is, stored as q + 128.
void pack_int8(const Strip& strip) {
  for (int row = 0; row < strip.count; ++row) {
    const auto x = static_cast<const uint8_t*>(strip.rows[row]);
    for (int64_t k = 0; k < strip.columns; ++k) {
      *column_of<uint8_t>(strip, row, k) = (k < strip.in_features ? x[k] : 0) ^ 0x80;
    }
  }
}

// ---- Tiles ----

// Floats, or for I8 panels integers whose sums wrap modulo 2^32 as those of vpdpbusd do.
template <Element PANEL>
using Sum = std::conditional_t<PANEL == Element::I8, uint32_t, float>;

// The value in `slot` of `row`.
template <Element WEIGHT>
float value_at(const uint8_t* values, int slot, int row) {
  if constexpr (is_int4(WEIGHT)) {
    const int byte = values[(slot / 8 * BLOCK_ROWS + row) * 4 + slot % 4];
    return static_cast<float>(static_cast<int8_t>(byte << (slot / 4 % 2 == 0 ? 4 : 0)) >> 4);
  } else {
    constexpr int LANE = lane_values(WEIGHT);
    const int index = (slot / LANE * BLOCK_ROWS + row) * LANE + slot % LANE;
    if constexpr (WEIGHT == Element::I8) return static_cast<float>(static_cast<int8_t>(values[index]));
    return load_float(values, WEIGHT, index);
  }
}

// A chunk of one block with every code spelled out: for each slot and row the value and its column in the chunk.
template <Element WEIGHT, Element PANEL>
struct Chunk {
  static constexpr int COLUMNS = chunk_columns(WEIGHT), SLOTS = COLUMNS / 2;
  static constexpr int UNIT = group_columns(pattern_of(WEIGHT)) / 4;  // columns
  Sum<PANEL> value[SLOTS][BLOCK_ROWS];
  int column[SLOTS][BLOCK_ROWS];

  explicit Chunk(const uint8_t* chunk) {
    for (int slot = 0; slot < SLOTS; ++slot) {
      const int unit = slot / UNIT;  // two of them a group, sixteen in each uint32 of codes
      for (int row = 0; row < BLOCK_ROWS; ++row) {
        const int codes = chunk[unit / 16 * CODES_BYTES + row * 4 + unit / 4 % 4];
        column[slot][row] = (unit / 2 * 4 + (codes >> unit % 4 * 2 & 3)) * UNIT + slot % UNIT;
        const float v = value_at<WEIGHT>(chunk + chunk_codes_bytes(WEIGHT), slot, row);
        if constexpr (PANEL == Element::I8) {
          value[slot][row] = static_cast<uint32_t>(static_cast<int32_t>(v)) << sum_shift(WEIGHT);
        } else {
          value[slot][row] = v;
        }
      }
    }
  }
};

template <Element WEIGHT, Element PANEL>
void multiply(const Linear& call, const Tile& tile) {
  using PanelValue = std::conditional_t<PANEL == Element::I8, uint8_t, float>;
  constexpr int COLUMNS = chunk_columns(WEIGHT), UNIT = UNIT_BYTES / sizeof(PanelValue);
  using Finished = std::conditional_t<PANEL == Element::I8, int32_t, float>;
  const int64_t bytes = block_bytes(call), chunks = chunk_count(WEIGHT, call.in_features);
  const int64_t shared = group_chunks(call);
  for (int64_t block = tile.first_block; block < tile.last_block; ++block) {
    const uint8_t* w = call.packed + block * bytes;
    const uint8_t* unit = tile.panel;
    Sum<PANEL> sums[PANEL_ROWS][BLOCK_ROWS] = {};
    float totals[PANEL_ROWS][BLOCK_ROWS] = {};
    for (int64_t chunk = 0; chunk < chunks; ++chunk, w += chunk_bytes(WEIGHT)) {
      const Chunk<WEIGHT, PANEL> decoded(w);
      for (int token = 0; token < tile.rows; ++token) {
        PanelValue x[COLUMNS];
        for (int k = 0; k < COLUMNS; k += UNIT) {
          std::memcpy(x + k, unit + (k / UNIT * tile.panel_rows + token) * UNIT_BYTES, UNIT_BYTES);
        }
        for (int slot = 0; slot < COLUMNS / 2; ++slot) {
          for (int row = 0; row < BLOCK_ROWS; ++row) {
            sums[token][row] += decoded.value[slot][row] * x[decoded.column[slot][row]];
          }
        }
      }
      unit += COLUMNS / UNIT * tile.panel_rows * UNIT_BYTES;
      if (call.group_size && ((chunk + 1) % shared == 0 || chunk + 1 == chunks)) {
        const auto group_sums = reinterpret_cast<const Finished*>(sums);
        portable_add_group(call, tile.rows, block, chunk / shared, group_sums, &totals[0][0]);
        std::memset(sums, 0, sizeof sums);
      }
    }
    if (call.group_size) {
      portable_finish(call, tile, block, &totals[0][0]);
    } else {
      portable_finish(call, tile, block, reinterpret_cast<const Finished*>(sums));
    }
  }
}

// ---- The epilogue ----

// The sum of the products of integers, from what a kernel has of an I8 panel; `row` of the block.
int32_t exact_sum(const Linear& call, int32_t sum, const uint8_t* compensations, int row) {
  uint32_t compensation;
  std::memcpy(&compensation, compensations + 4 * row, sizeof compensation);
  return static_cast<int32_t>(static_cast<uint32_t>(sum) - compensation) >> sum_shift(call.weight);
}

// v = epilogue of a sum that is scaled already, for output feature n of token m; an I8 y is not rounded yet.
void finish(const Linear& call, int64_t m, int64_t n, float v) {
  const Epilogue& epilogue = call.epilogue;
  if (epilogue.bias) v += load_float(epilogue.bias, element_of(epilogue.bias_type), n);
  if (epilogue.residual) {
    v += load_float(epilogue.residual, element_of(epilogue.residual_type), m * epilogue.residual_stride + n);
  }
  v = activate(epilogue.activation, v);
  const int64_t at = call.y_index(m, n);
  if (epilogue.y_type != Number::I8) return store_float(epilogue.y, element_of(epilogue.y_type), at, v);
  const float q = std::nearbyint(v / *epilogue.y_scale);
  static_cast<int8_t*>(epilogue.y)[at] = std::isnan(q) ? 0 : static_cast<int8_t>(std::clamp(q, -127.0f, 127.0f));
}

template <class Body>
void for_each_output(const Linear& call, const Tile& tile, int64_t block, const Body& body) {
  const int64_t first = block * BLOCK_ROWS;
  const int count = static_cast<int>(std::min<int64_t>(BLOCK_ROWS, call.epilogue.out_features - first));
  for (int token = 0; token < tile.rows; ++token) {
    for (int row = 0; row < count; ++row) body(token, row, tile.first_token + token, first + row);
  }
}

}  // namespace

void portable_finish(const Linear& call, const Tile& tile, int64_t block, const float* sums) {
  const float* const scales = call.group_size ? nullptr : call.epilogue.scales;
  const float* const x_scales = call.group_size ? tile.x_scales : nullptr;
  for_each_output(call, tile, block, [&](int token, int row, int64_t m, int64_t n) {
    const float sum = sums[token * BLOCK_ROWS + row];
    finish(call, m, n, scales ? sum * scales[n] : x_scales ? sum * x_scales[token] : sum);
  });
}

void portable_finish(const Linear& call, const Tile& tile, int64_t block, const int32_t* sums) {
  const Epilogue& epilogue = call.epilogue;
  const uint8_t* const compensations = compensation_of(call, block, 0);
  for_each_output(call, tile, block, [&](int token, int row, int64_t m, int64_t n) {
    const int32_t sum = exact_sum(call, sums[token * BLOCK_ROWS + row], compensations, row);
    if (epilogue.y_type == Number::I32) {
      static_cast<int32_t*>(epilogue.y)[call.y_index(m, n)] = sum;
    } else {
      finish(call, m, n, static_cast<float>(sum) * (tile.x_scales[token] * epilogue.scales[n]));
    }
  });
}

namespace {

// Adds value(row of x, row of the block) * scale to each total that is one of W's.
template <class Value>
void add_group(const Linear& call, int rows, int64_t block, int64_t group, float* totals, const Value& value) {
  const int64_t first = block * BLOCK_ROWS, out_features = call.epilogue.out_features;
  const int count = static_cast<int>(std::min<int64_t>(BLOCK_ROWS, out_features - first));
  const float* const scales = call.epilogue.scales + group * out_features + first;
  for (int token = 0; token < rows; ++token) {
    for (int row = 0; row < count; ++row) totals[token * BLOCK_ROWS + row] += value(token, row) * scales[row];
  }
}

}  // namespace

void portable_add_group(const Linear& call, int rows, int64_t block, int64_t group, const float* sums, float* totals) {
  add_group(call, rows, block, group, totals, [&](int token, int row) { return sums[token * BLOCK_ROWS + row]; });
}

void portable_add_group(const Linear& call, int rows, int64_t block, int64_t group, const int32_t* sums,
                        float* totals) {
  const uint8_t* const compensations = compensation_of(call, block, group);
  add_group(call, rows, block, group, totals, [&](int token, int row) {
    return static_cast<float>(exact_sum(call, sums[token * BLOCK_ROWS + row], compensations, row));
  });
}

const Kernels* portable_kernels(Element weight, bool weight_only, Element x_element) {
  static constexpr auto floats = [](void (*multiply)(const Linear&, const Tile&)) {
    return Kernels{"portable", Element::F32, PANEL_ROWS, 1, pack_floats<false>, multiply};
  };
  static constexpr auto integers = [](void (*pack)(const Strip&), void (*multiply)(const Linear&, const Tile&)) {
    return Kernels{"portable", Element::I8, PANEL_ROWS, 1, pack, multiply};
  };
  static constexpr Kernels F32 = floats(multiply<Element::F32, Element::F32>);
  static constexpr Kernels F16 = floats(multiply<Element::F16, Element::F32>);
  static constexpr Kernels BF16{"portable", Element::F32,      PANEL_ROWS,
                                1,          pack_floats<true>, multiply<Element::BF16, Element::F32>};
  static constexpr Kernels I8_ONLY = floats(multiply<Element::I8, Element::F32>);
  static constexpr Kernels I4_ONLY = floats(multiply<Element::I4, Element::F32>);
  static constexpr Kernels I4_TWO_FOUR = floats(multiply<Element::I4_TWO_FOUR, Element::F32>);
  static constexpr Kernels I8[] = {integers(quantize_rows, multiply<Element::I8, Element::I8>),
                                   integers(pack_int8, multiply<Element::I8, Element::I8>)};
  static constexpr Kernels I4[] = {integers(quantize_rows, multiply<Element::I4, Element::I8>),
                                   integers(pack_int8, multiply<Element::I4, Element::I8>)};
  const bool int8_x = x_element == Element::I8;
  switch (weight) {
    case Element::F16:
      return &F16;
    case Element::BF16:
      return &BF16;
    case Element::I8:
      return weight_only ? &I8_ONLY : &I8[int8_x];
    case Element::I4:
      return weight_only ? &I4_ONLY : &I4[int8_x];
    case Element::I4_TWO_FOUR:
      return &I4_TWO_FOUR;
    default:
      return &F32;
  }
}

}  // namespace sparse24::cpu
