// linear() in plain C++: the same packed form, panels and rounding as the vector kernels.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "csrc/cpu/linear_kernels.h"

namespace sparse24::cpu {
namespace {

// ---- Elements ----

float f16_to_float(uint16_t half) {
  const uint32_t exponent = half >> 10 & 31, fraction = half & 1023, sign = static_cast<uint32_t>(half >> 15) << 31;
  if (exponent == 0) return std::copysign(static_cast<float>(fraction) * 0x1p-24f, std::bit_cast<float>(sign));
  return std::bit_cast<float>(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13);
}

uint16_t float_to_f16(float value) {  // to nearest, ties to even
  const uint32_t bits = std::bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffff;
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return sign | 0x7e00;   // NaN
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and above round to Inf
  if (magnitude < 0x38800000) {                       // subnormal: the last bit of 0.5f weighs 2^-24, as theirs
    return sign | static_cast<uint16_t>(std::bit_cast<uint32_t>(std::fabs(value) + 0.5f) - 0x3f000000);
  }
  return sign | static_cast<uint16_t>((magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

float bf16_to_float(uint16_t half) { return std::bit_cast<float>(static_cast<uint32_t>(half) << 16); }

uint16_t float_to_bf16(float value) {  // to nearest, ties to even
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

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

// As floats; for BF16 weights rounded to bfloat16, as every instruction set does.
template <bool ROUND_TO_BF16>
void pack_float_row(const Linear& call, int64_t token, uint8_t* unit, int64_t unit_stride, float*) {
  const void* row = row_of_x(call, token);
  const int64_t columns = chunk_count(Element::F32, call.in_features) * chunk_columns(Element::F32);
  for (int64_t k = 0; k < columns; k += 16, unit += unit_stride) {
    float floats[16] = {};
    for (int64_t i = 0; i < std::min<int64_t>(16, call.in_features - k); ++i) {
      floats[i] = load_float(row, call.x_element, k + i);
      if (ROUND_TO_BF16) floats[i] = bf16_to_float(float_to_bf16(floats[i]));
    }
    std::memcpy(unit, floats, UNIT_BYTES);
  }
}

// s = amax / 127, q = clamp(round-to-nearest-even(x / s), -127, 127), stored as q + 128. A row with an Inf or a NaN
// gets the scale NaN; one whose amax / 127 is 0 gets the scale 1.
void pack_i8_row(const Linear& call, int64_t token, uint8_t* unit, int64_t unit_stride, float* scale) {
  const void* row = row_of_x(call, token);
  float amax = 0;
  bool finite = true;
  for (int64_t k = 0; k < call.in_features; ++k) {
    const float magnitude = std::fabs(load_float(row, call.x_element, k));
    finite = finite && magnitude <= std::numeric_limits<float>::max();
    amax = std::max(amax, magnitude);
  }
  *scale = finite ? amax / 127 : std::numeric_limits<float>::quiet_NaN();
  if (*scale == 0) *scale = 1;

  const int64_t columns = chunk_count(Element::I8, call.in_features) * chunk_columns(Element::I8);
  for (int64_t k = 0; k < columns; ++k) {
    float q = 0;
    if (finite && k < call.in_features) q = std::nearbyint(load_float(row, call.x_element, k) / *scale);
    unit[k / 64 * unit_stride + k % 64] = static_cast<uint8_t>(static_cast<int>(std::clamp(q, -127.0f, 127.0f)) + 128);
  }
}

// ---- Tiles ----

// Floats, or for I8 integers whose sums wrap modulo 2^32 as those of vpdpbusd do.
template <Element WEIGHT>
using Number = std::conditional_t<WEIGHT == Element::I8, uint32_t, float>;

template <Element WEIGHT>
Number<WEIGHT> value_at(const uint8_t* values, int index) {
  if constexpr (WEIGHT == Element::I8) return static_cast<uint32_t>(static_cast<int8_t>(values[index]));
  return load_float(values, WEIGHT, index);
}

// A chunk of one block with every code spelled out: for each slot and row the value and its column in the chunk.
template <Element WEIGHT>
struct Chunk {
  static constexpr int COLUMNS = chunk_columns(WEIGHT), SLOTS = COLUMNS / 2, LANE = lane_values(WEIGHT);
  Number<WEIGHT> value[SLOTS][BLOCK_ROWS];
  int column[SLOTS][BLOCK_ROWS];

  explicit Chunk(const uint8_t* chunk) {
    for (int slot = 0; slot < SLOTS; ++slot) {
      for (int row = 0; row < BLOCK_ROWS; ++row) {
        const uint8_t codes = chunk[slot / 16 * CODES_BYTES + row * 4 + slot / 4 % 4];
        column[slot][row] = slot / 2 * 4 + (codes >> slot % 4 * 2 & 3);
        value[slot][row] =
            value_at<WEIGHT>(chunk + chunk_codes_bytes(WEIGHT), (slot / LANE * BLOCK_ROWS + row) * LANE + slot % LANE);
      }
    }
  }
};

template <Element WEIGHT>
void multiply(const Linear& call, const Tile& tile) {
  constexpr int COLUMNS = chunk_columns(WEIGHT);
  constexpr int UNIT_COLUMNS = WEIGHT == Element::I8 ? 64 : 16;
  const int64_t bytes = block_bytes(WEIGHT, call.in_features);
  for (int64_t block = tile.first_block; block < tile.last_block; ++block) {
    const uint8_t* w = call.packed + block * bytes;
    const uint8_t* unit = tile.panel;
    Number<WEIGHT> sums[PANEL_ROWS][BLOCK_ROWS] = {};
    for (int64_t chunk = 0; chunk < chunk_count(WEIGHT, call.in_features); ++chunk, w += chunk_bytes(WEIGHT)) {
      const Chunk<WEIGHT> decoded(w);
      for (int token = 0; token < tile.rows; ++token) {
        Number<WEIGHT> x[COLUMNS];
        for (int k = 0; k < COLUMNS; ++k) {
          const uint8_t* columns = unit + (k / UNIT_COLUMNS * tile.rows + token) * UNIT_BYTES;
          if constexpr (WEIGHT == Element::I8) {
            x[k] = columns[k] - 128u;
          } else {
            x[k] = load_float(columns, Element::F32, k % UNIT_COLUMNS);
          }
        }
        for (int slot = 0; slot < COLUMNS / 2; ++slot) {
          for (int row = 0; row < BLOCK_ROWS; ++row) {
            sums[token][row] += decoded.value[slot][row] * x[decoded.column[slot][row]];
          }
        }
      }
      unit += COLUMNS / UNIT_COLUMNS * tile.rows * UNIT_BYTES;
    }
    for (int token = 0; token < tile.rows; ++token) {
      const int64_t first = block * BLOCK_ROWS, last = std::min(first + BLOCK_ROWS, call.out_features);
      for (int64_t n = first; n < last; ++n) {
        float y;
        if constexpr (WEIGHT == Element::I8) {
          y = static_cast<float>(static_cast<int32_t>(sums[token][n - first])) *
              (call.scales[n] * tile.token_scales[token]);
        } else {
          y = sums[token][n - first];
        }
        if (call.bias) y += load_float(call.bias, call.bias_element, n);
        store_float(call.y, call.x_element, (tile.first_token + token) * call.y_stride + n,
                    activate(call.activation, y));
      }
    }
  }
}

constexpr Kernels F32_KERNELS{Element::F32, pack_float_row<false>, multiply<Element::F32>};
constexpr Kernels F16_KERNELS{Element::F32, pack_float_row<false>, multiply<Element::F16>};
constexpr Kernels BF16_KERNELS{Element::F32, pack_float_row<true>, multiply<Element::BF16>};
constexpr Kernels I8_KERNELS{Element::I8, pack_i8_row, multiply<Element::I8>};

}  // namespace

const Kernels& portable_kernels(Element weight_element) {
  switch (weight_element) {
    case Element::F16:
      return F16_KERNELS;
    case Element::BF16:
      return BF16_KERNELS;
    case Element::I8:
      return I8_KERNELS;
    default:
      return F32_KERNELS;
  }
}

}  // namespace sparse24::cpu
