// cvt to and from packed values and tf32, and cvt.pack. Source: PTX ISA, "cvt", "cvt.pack", "Alternate Floating-Point
// Data Formats".
//
// Of two operands the first goes to the upper element. NaN is all ones but the sign (0x7fffffff as tf32); the formats
// of 4 and 6 bits, which have none, give their largest number. Not supported are stochastic rounding (.rs), the targets
// ue8m0x2 and s2f6x2, and the source s2f6x2.
#include <algorithm>
#include <array>
#include <cmath>

#include "csrc/ptx/execute/float.h"
#include "csrc/ptx/execute/lanes.h"
#include "csrc/ptx/numbers.h"

namespace sparse24::ptx {
namespace {

enum Option { ROUNDING, FLAGS, TARGET, SOURCE };  // indices of Operation::option; the latter two, of PACKED
enum Flag : uint8_t { RELU = 1, FINITE = 2 };

// Pairs, and the distance in bits between their elements.
struct Packed {
  std::string_view name;
  Format format;
  int stride;
};
constexpr std::array PACKED{
    Packed{"f16x2", HALF, 16}, Packed{"bf16x2", BFLOAT16, 16}, Packed{"e4m3x2", E4M3, 8}, Packed{"e5m2x2", E5M2, 8},
    Packed{"e2m3x2", E2M3, 8}, Packed{"e3m2x2", E3M2, 8},      Packed{"e2m1x2", E2M1, 4},
};

class Encoder {
 public:
  Encoder(const Operation& operation, const Format& format)
      : format_(format),
        rounding_(static_cast<Rounding>(operation.option[ROUNDING])),
        relu_((operation.option[FLAGS] & RELU) != 0),
        finite_((operation.option[FLAGS] & FINITE) != 0) {}
  uint32_t operator()(float value) const {
    return encode(relu_ ? rectified(value) : value, format_, rounding_, finite_);
  }

 private:
  Format format_;
  Rounding rounding_;
  bool relu_, finite_;
};

void pair_of_singles(Warp& warp, const Operation& operation, uint32_t lanes) {
  uint32_t* const d = warp.lanes<uint32_t>(operation.slot[0]);
  const float *const a = warp.lanes<float>(operation.slot[1]), *const b = warp.lanes<float>(operation.slot[2]);
  const Packed& target = PACKED[operation.option[TARGET]];
  const Encoder encoded(operation, target.format);
  each(lanes, [&](int lane) { d[lane] = encoded(a[lane]) << target.stride | encoded(b[lane]); });
}

void pair_of_pair(Warp& warp, const Operation& operation, uint32_t lanes) {
  uint32_t* const d = warp.lanes<uint32_t>(operation.slot[0]);
  const uint32_t* const a = warp.lanes<uint32_t>(operation.slot[1]);
  const Packed &target = PACKED[operation.option[TARGET]], &source = PACKED[operation.option[SOURCE]];
  const Encoder encoded(operation, target.format);
  each(lanes, [&](int lane) {
    const float low = decode(a[lane], source.format), high = decode(a[lane] >> source.stride, source.format);
    d[lane] = encoded(high) << target.stride | encoded(low);
  });
}

constexpr auto two_halves = [](float a, float b) { return float_to_half(a) << 16 | float_to_half(b); };
constexpr auto two_brains = [](float a, float b) { return float_to_bfloat16(a) << 16 | float_to_bfloat16(b); };

void set_options(const Chosen& chosen, Operation& operation) {
  operation.option[ROUNDING] = static_cast<uint8_t>(rounding_of(chosen));
  operation.option[FLAGS] =
      static_cast<uint8_t>((chosen.has("relu") ? RELU : 0) | (chosen.has("satfinite") ? FINITE : 0));
  int target = -1, source = -1;  // the places of their names: the target comes first
  for (size_t i = 0; i < PACKED.size(); ++i) {
    const int place = chosen.place_of(PACKED[i].name);
    if (place < 0) continue;
    const bool is_target = target < 0 || place < target;
    if (is_target) {
      source = target;
      operation.option[SOURCE] = operation.option[TARGET];
    }
    (is_target ? target : source) = place;
    operation.option[is_target ? TARGET : SOURCE] = static_cast<uint8_t>(i);
  }
}

// A row does not say which of its types comes first.
bool is_last(const Chosen& chosen, std::string_view source) {
  const int place = chosen.place_of(source);
  for (const Packed& pair : PACKED) {
    if (chosen.place_of(pair.name) > place) return false;
  }
  return chosen.place_of("tf32") < place;
}

template <Handler HANDLER>
bool choose_of_singles(const Chosen& chosen, Operation& operation) {
  set_options(chosen, operation);
  operation.run = HANDLER;
  return is_last(chosen, "f32");
}

bool is_wide(const Packed& pair) { return pair.stride == 16; }

template <bool WIDENS>
bool choose_of_pair(const Chosen& chosen, Operation& operation) {
  set_options(chosen, operation);
  operation.run = pair_of_pair;
  return is_wide(PACKED[operation.option[TARGET]]) == WIDENS && is_wide(PACKED[operation.option[SOURCE]]) != WIDENS;
}

bool choose_halves(const Chosen& chosen, Operation& operation) {
  set_options(chosen, operation);
  const bool common = operation.option[ROUNDING] == 0 && operation.option[FLAGS] == 0;
  operation.run = !common                         ? pair_of_singles
                  : chosen.type(0) == Type::F16X2 ? lanewise<two_halves, uint32_t, float, float>
                                                  : lanewise<two_brains, uint32_t, float, float>;
  return is_last(chosen, "f32");
}

// ---- tf32: the upper 19 bits of an f32 ----

void tensor32(Warp& warp, const Operation& operation, uint32_t lanes) {
  uint32_t* const d = warp.lanes<uint32_t>(operation.slot[0]);
  const float* const a = warp.lanes<float>(operation.slot[1]);
  const Encoder encoded(operation, TENSOR32);
  each(lanes, [&](int lane) { d[lane] = std::isnan(a[lane]) ? 0x7fffffff : encoded(a[lane]) << 13; });
}

// ---- ue8m0: 2^(code - 127), all ones is NaN. 2^-127 is a subnormal bf16 ----

constexpr auto power_of_two = [](uint32_t code) { return code == 0xff ? 0x7fffu : code == 0 ? 0x40u : code << 7; };
constexpr auto two_powers = [](uint32_t a) { return power_of_two(a & 0xff) | power_of_two(a >> 8 & 0xff) << 16; };

// ---- cvt.pack: two s32, saturated to a few bits, below what is left of c ----

template <int BITS, bool SIGNED>
constexpr auto packed = [](int32_t a, int32_t b, uint32_t c) {
  constexpr int32_t LEAST = SIGNED ? -(1 << (BITS - 1)) : 0, MOST = (1 << (SIGNED ? BITS - 1 : BITS)) - 1;
  const auto cut = [&](int32_t value) {
    return static_cast<uint32_t>(std::clamp(value, LEAST, MOST)) & ((1u << BITS) - 1);
  };
  return static_cast<uint32_t>(uint64_t{c} << (2 * BITS)) | cut(a) << BITS | cut(b);
};
template <int BITS, bool SIGNED>
constexpr auto packed_alone = [](int32_t a, int32_t b) { return packed<BITS, SIGNED>(a, b, 0); };

bool choose_pack(const Chosen& chosen, Operation& operation) {
  static constexpr Handler HANDLERS[] = {
      lanewise<packed<2, false>, uint32_t, int32_t, int32_t, uint32_t>,
      lanewise<packed<2, true>, uint32_t, int32_t, int32_t, uint32_t>,
      lanewise<packed<4, false>, uint32_t, int32_t, int32_t, uint32_t>,
      lanewise<packed<4, true>, uint32_t, int32_t, int32_t, uint32_t>,
      lanewise<packed<8, false>, uint32_t, int32_t, int32_t, uint32_t>,
      lanewise<packed<8, true>, uint32_t, int32_t, int32_t, uint32_t>,
      lanewise<packed_alone<16, false>, uint32_t, int32_t, int32_t>,
      lanewise<packed_alone<16, true>, uint32_t, int32_t, int32_t>,
  };
  static constexpr std::string_view TARGETS[] = {"u2", "s2", "u4", "s4", "u8", "s8", "u16", "s16"};
  for (size_t i = 0; i < std::size(TARGETS); ++i) {
    const int place = chosen.place_of(TARGETS[i]);
    if (place < 0) continue;
    operation.run = HANDLERS[i];
    return chosen.place_of("s32") == place + 1 && (!chosen.has("b32") || chosen.place_of("b32") == place + 2);
  }
  return false;
}

bool choose_powers(const Chosen& chosen, Operation& operation) {
  operation.run = lanewise<two_powers, uint32_t, uint32_t>;
  return chosen.place_of("bf16x2") < chosen.place_of("ue8m0x2");
}

const Form FORMS[] = {
    {"cvt", "rn|rz relu? satfinite? f16x2|bf16x2 f32", "=0, f32, f32", choose_halves},
    {"cvt", "rna satfinite? tf32 f32", "=0, f32", choose_of_singles<tensor32>},
    {"cvt", "rn|rz relu? satfinite? tf32 f32", "=0, f32", choose_of_singles<tensor32>},
    {"cvt", "rn satfinite relu? e4m3x2|e5m2x2|e2m3x2|e3m2x2 f32", "=b16, f32, f32", choose_of_singles<pair_of_singles>},
    {"cvt", "rn satfinite relu? e4m3x2|e5m2x2|e2m3x2|e3m2x2 f16x2|bf16x2", "=b16, b32", choose_of_pair<false>},
    {"cvt", "rn relu? f16x2 e4m3x2|e5m2x2|e2m3x2|e3m2x2", "=b32, b16", choose_of_pair<true>},
    {"cvt", "rn satfinite relu? e2m1x2 f32", "=b8, f32, f32", choose_of_singles<pair_of_singles>},
    {"cvt", "rn satfinite relu? e2m1x2 f16x2|bf16x2", "=b8, b32", choose_of_pair<false>},
    {"cvt", "rn relu? f16x2 e2m1x2", "=b32, b8", choose_of_pair<true>},
    {"cvt", "rn bf16x2 ue8m0x2", "=b32, b16", choose_powers},
    {"cvt", "pack sat u16|s16 s32", "=b32, s32, s32", choose_pack},
    {"cvt", "pack sat u2|s2|u4|s4|u8|s8 s32 b32", "=b32, s32, s32, b32", choose_pack},
};

}  // namespace

Forms packed_convert_forms() { return FORMS; }

}  // namespace sparse24::ptx
