// linear() in NEON, of what every AArch64 CPU has: four rows of W a vector. A table lookup picks the bytes of a column
// from a group of x by the codes of the rows; then floats are multiplied and added, integers widened and summed
// exactly. Rows of x are packed, and y is finished, in plain C++.
#include <arm_neon.h>

#include <cstring>

#include "csrc/cpu/linear/linear_kernels.h"

namespace sparse24::cpu {
namespace {

constexpr int QUARTERS = BLOCK_ROWS / 4;

uint32x4_t load(const uint8_t* at) { return vreinterpretq_u32_u8(vld1q_u8(at)); }

// ---- Dot products: each adds the products of one step, a group or for I8 two, of four rows of W and one of x ----

// The values of one slot of four rows. `values` begins at the rows.
template <Element WEIGHT>
float32x4_t float_values(const uint8_t* values, int slot) {
  if constexpr (WEIGHT == Element::F32) return vreinterpretq_f32_u32(load(values + 64 * slot));
  if constexpr (WEIGHT == Element::F16) {
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(values + 32 * slot)));
  }
  if constexpr (WEIGHT == Element::BF16) {
    const uint32x4_t both = load(values + slot / 2 * 64);
    return vreinterpretq_f32_u32(slot % 2 == 0 ? vshlq_n_u32(both, 16) : vandq_u32(both, vdupq_n_u32(0xffff0000)));
  }
  // Integers: to the top of the lane, and down again with the sign.
  constexpr bool I8 = WEIGHT == Element::I8;
  const uint32x4_t all = load(values + slot / (I8 ? 4 : 8) * 64);
  const int up = I8 ? 24 - slot % 4 * 8 : 28 - slot % 4 * 8 - slot / 4 % 2 * 4;
  const int32x4_t top = vreinterpretq_s32_u32(vshlq_u32(all, vdupq_n_s32(up)));
  return vcvtq_f32_s32(vshlq_s32(top, vdupq_n_s32(I8 ? -24 : -28)));
}

template <Element ELEMENT>
struct FloatDot {
  static constexpr Element WEIGHT = ELEMENT, PANEL = Element::F32;
  static constexpr int GROUPS = 1, GROUP_BYTES = group_columns(pattern_of(ELEMENT)) * 4;  // a step; of x
  using Sum = float32x4_t;
  using Number = float;

  static void add(Sum& sum, uint32x4_t codes, const uint8_t* values, int group, const uint8_t* x) {
    constexpr int UNIT = group_columns(pattern_of(WEIGHT)) / 4, SLOTS = 2 * UNIT;
    for (int slot = 0; slot < SLOTS; ++slot) {
      const uint32x4_t unit =
          vandq_u32(vshlq_u32(codes, vdupq_n_s32(-(group % 8 * 4 + slot / UNIT * 2))), vdupq_n_u32(3));
      const uint32x4_t column = vaddq_u32(vmulq_n_u32(unit, UNIT), vdupq_n_u32(slot % UNIT));
      // The four bytes of that float.
      const uint8x16_t bytes =
          vreinterpretq_u8_u32(vaddq_u32(vmulq_n_u32(column, 0x04040404), vdupq_n_u32(0x03020100)));
      uint8x16_t picked;
      if constexpr (UNIT == 1) {
        picked = vqtbl1q_u8(vld1q_u8(x), bytes);
      } else {
        picked = vqtbl2q_u8(uint8x16x2_t{{vld1q_u8(x), vld1q_u8(x + 16)}}, bytes);
      }
      sum = vfmaq_f32(sum, vreinterpretq_f32_u8(picked), float_values<WEIGHT>(values, group * SLOTS + slot));
    }
  }
  static void store(Number* to, Sum sum) { vst1q_f32(to, sum); }
};

template <Element ELEMENT>
struct IntegerDot {
  static constexpr Element WEIGHT = ELEMENT, PANEL = Element::I8;
  static constexpr int GROUPS = ELEMENT == Element::I8 ? 2 : 1, GROUP_BYTES = 8 / GROUPS;
  using Sum = int32x4_t;
  using Number = int32_t;

  static void add(Sum& sum, uint32x4_t codes, const uint8_t* all, int group, const uint8_t* x) {
    codes = vshlq_u32(codes, vdupq_n_s32(-(group % 8 * 4)));
    // Of each lane's four values the places among eight columns: I8 has four indices of columns, the last two of the
    // second group; I4 two of pairs.
    uint32x4_t places = vdupq_n_u32(WEIGHT == Element::I8 ? 0x04040000 : 0x01000100);
    for (int i = 0; i < 4; ++i) {
      const int index = WEIGHT == Element::I8 ? i : i / 2;
      const uint32x4_t place = vandq_u32(vshlq_u32(codes, vdupq_n_s32(-2 * index)), vdupq_n_u32(3));
      places = vaddq_u32(places, vshlq_u32(place, vdupq_n_s32(8 * i + (WEIGHT == Element::I8 ? 0 : 1))));
    }
    const uint8x8_t columns = vld1_u8(x);
    const uint8x16_t picked = vqtbl1q_u8(vcombine_u8(columns, columns), vreinterpretq_u8_u32(places));
    uint32x4_t four = load(all + group / 2 * 64);
    if constexpr (WEIGHT == Element::I4) {  // 16 w, of the low or the high nibbles
      if (group % 2 == 0) four = vshlq_n_u32(four, 4);
      four = vandq_u32(four, vdupq_n_u32(0xf0f0f0f0));
    }
    const int8x16_t values = vreinterpretq_s8_u32(four);
    const int16x8_t x_low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(picked))), low = vmovl_s8(vget_low_s8(values));
    const int16x8_t x_high = vreinterpretq_s16_u16(vmovl_high_u8(picked)), high = vmovl_high_s8(values);
    const int32x4_t first = vpaddq_s32(vmull_s16(vget_low_s16(x_low), vget_low_s16(low)), vmull_high_s16(x_low, low));
    const int32x4_t last =
        vpaddq_s32(vmull_s16(vget_low_s16(x_high), vget_low_s16(high)), vmull_high_s16(x_high, high));
    sum = vaddq_s32(sum, vpaddq_s32(first, last));
  }
  static void store(Number* to, Sum sum) { vst1q_s32(to, sum); }
};

// ---- Tiles ----

template <class Dot>
void multiply(const Linear& call, const Tile& tile) {
  constexpr int COLUMNS = chunk_columns(Dot::WEIGHT);
  constexpr int GROUPS = COLUMNS / group_columns(pattern_of(Dot::WEIGHT));
  constexpr int QUARTER_BYTES = Dot::WEIGHT == Element::F16 ? 8 : 16;  // four rows of a vector of values
  const int64_t unit_stride = tile.panel_rows * UNIT_BYTES;
  const int64_t chunks = chunk_count(Dot::WEIGHT, call.in_features), shared = group_chunks(call);
  for (int64_t block = tile.first_block; block < tile.last_block; ++block) {
    typename Dot::Number results[PANEL_ROWS][BLOCK_ROWS];
    float totals[PANEL_ROWS][BLOCK_ROWS] = {};
    for (int row = 0; row < tile.rows; ++row) {
      const uint8_t* w = call.packed + block * block_bytes(call);
      const uint8_t* x = tile.panel + row * UNIT_BYTES;
      typename Dot::Sum sums[QUARTERS] = {};
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        for (int group = 0; group < GROUPS; group += Dot::GROUPS) {
          const int at = group * Dot::GROUP_BYTES;
          const uint8_t* const columns = x + at / UNIT_BYTES * unit_stride + at % UNIT_BYTES;
          for (int quarter = 0; quarter < QUARTERS; ++quarter) {
            const uint32x4_t codes = load(w + group / 8 * CODES_BYTES + 16 * quarter);
            const uint8_t* const values = w + chunk_codes_bytes(Dot::WEIGHT) + quarter * QUARTER_BYTES;
            Dot::add(sums[quarter], codes, values, group, columns);
          }
        }
        w += chunk_bytes(Dot::WEIGHT);
        x += COLUMNS * (Dot::PANEL == Element::F32 ? 4 : 1) / UNIT_BYTES * unit_stride;
        if (call.group_size && ((chunk + 1) % shared == 0 || chunk + 1 == chunks)) {
          for (int quarter = 0; quarter < QUARTERS; ++quarter) {
            Dot::store(results[row] + 4 * quarter, sums[quarter]);
            sums[quarter] = typename Dot::Sum{};
          }
          portable_add_group(call, 1, block, chunk / shared, results[row], totals[row]);
        }
      }
      for (int quarter = 0; quarter < QUARTERS; ++quarter) Dot::store(results[row] + 4 * quarter, sums[quarter]);
    }
    if (call.group_size) {
      portable_finish(call, tile, block, &totals[0][0]);
    } else {
      portable_finish(call, tile, block, &results[0][0]);
    }
  }
}

template <class Dot>
Kernels kernels_of(bool weight_only, Element x_element) {
  return {"perm",       Dot::PANEL, PANEL_ROWS, 1, portable_kernels(Dot::WEIGHT, weight_only, x_element)->pack,
          multiply<Dot>};
}

}  // namespace

const Kernels* neon_kernels(Element weight, bool weight_only, Element x_element) {
  static const Kernels F32 = kernels_of<FloatDot<Element::F32>>(false, Element::F32);
  static const Kernels F16 = kernels_of<FloatDot<Element::F16>>(false, Element::F32);
  static const Kernels BF16 = kernels_of<FloatDot<Element::BF16>>(false, Element::F32);
  static const Kernels I8_ONLY = kernels_of<FloatDot<Element::I8>>(true, Element::F32);
  static const Kernels I4_ONLY = kernels_of<FloatDot<Element::I4>>(true, Element::F32);
  static const Kernels I4_TWO_FOUR = kernels_of<FloatDot<Element::I4_TWO_FOUR>>(true, Element::F32);
  static const Kernels I8[] = {kernels_of<IntegerDot<Element::I8>>(false, Element::F32),
                               kernels_of<IntegerDot<Element::I8>>(false, Element::I8)};
  static const Kernels I4[] = {kernels_of<IntegerDot<Element::I4>>(false, Element::F32),
                               kernels_of<IntegerDot<Element::I4>>(false, Element::I8)};
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
