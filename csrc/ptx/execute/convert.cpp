// cvt between scalars. Source: PTX ISA, "cvt", "Scalar Conversions".
//
// A value is rounded once: sources of up to 53 significant bits are exact in a double, and of a 64-bit integer there is
// the double that rounds as it does (numbers.h). NaN gives 0x7fffffff or 0x7fff; as an integer it gives 0, or the
// greatest bit where the source is f64 or the integer has 64 bits.
#include <algorithm>
#include <cmath>
#include <limits>

#include "csrc/ptx/execute/family.h"
#include "csrc/ptx/execute/float.h"
#include "csrc/ptx/execute/lanes.h"
#include "csrc/ptx/numbers.h"

namespace sparse24::ptx {
namespace {

enum Flag : uint8_t { FTZ = 1, SAT = 2, RELU = 4, FINITE = 8, INTEGRAL = 16 };

// Operation::option[0] and [1].
struct Mode {
  Rounding rounding;
  uint8_t flags;
  bool has(Flag flag) const { return (flags & flag) != 0; }
};

// ---- what a lane of a slot holds: an integer type, or one of these ----

struct Half {
  using Cell = uint32_t;
  static double read(Cell cell, const Mode&) { return decode(cell, HALF); }
  static Cell write(double value, const Mode& mode) { return encode(value, HALF, mode.rounding, mode.has(FINITE)); }
};
struct Brain {
  using Cell = uint32_t;
  static double read(Cell cell, const Mode&) { return decode(cell, BFLOAT16); }
  static Cell write(double value, const Mode& mode) { return encode(value, BFLOAT16, mode.rounding, mode.has(FINITE)); }
};
struct Single {  // .ftz concerns f32 only
  using Cell = uint32_t;
  static double read(Cell cell, const Mode& mode) {
    const float value = std::bit_cast<float>(cell);
    return mode.has(FTZ) ? flushed(value) : value;
  }
  static Cell write(double value, const Mode& mode) {
    const Cell cell = encode(value, SINGLE, mode.rounding);
    return mode.has(FTZ) && (cell & 0x7f800000) == 0 ? cell & 0x80000000 : cell;
  }
};
struct Twice {
  using Cell = uint64_t;
  static double read(Cell cell, const Mode&) { return std::bit_cast<double>(cell); }
  static Cell write(double value, const Mode&) { return std::bit_cast<Cell>(value); }
};

template <class T>
struct CellOfType {
  using type = typename T::Cell;
};
template <class T>
  requires std::is_integral_v<T>
struct CellOfType<T> {
  using type = Cell<T>;
};
template <class T>
using CellOf = typename CellOfType<T>::type;

// ---- one value ----

double to_integral(double value, Rounding rounding) {
  switch (rounding) {
    case Rounding::ZERO:
      return std::trunc(value);
    case Rounding::DOWN:
      return std::floor(value);
    case Rounding::UP:
      return std::ceil(value);
    default:
      return std::nearbyint(value);  // the host rounds to nearest even
  }
}

template <class D>
D clamped(double value) {
  using Limits = std::numeric_limits<D>;
  // The limits may not be doubles; a power of two is.
  if (value < static_cast<double>(Limits::min())) return Limits::min();
  if (value >= std::ldexp(1.0, Limits::digits)) return Limits::max();
  return static_cast<D>(value);
}

template <class D, class S>
D clamped_integer(S value) {
  using Limits = std::numeric_limits<D>;
  if constexpr (std::is_signed_v<S>) {
    if (std::is_unsigned_v<D> && value < 0) return 0;
    if (std::is_signed_v<D> && sizeof(D) < sizeof(S) && value < static_cast<S>(Limits::min())) return Limits::min();
  }
  return std::cmp_greater(value, Limits::max()) ? Limits::max() : static_cast<D>(value);
}

// The value and what its conversion to double leaves out.
template <class S>
Exact<double> exact(S value) {
  const double high = static_cast<double>(value);
  if constexpr (sizeof(S) < 8) {
    return {high, 0};
  } else {
    return {high, static_cast<double>(static_cast<__int128>(value) - static_cast<__int128>(high))};
  }
}

template <class D, class S>
CellOf<D> convert(CellOf<S> cell, const Mode& mode) {
  if constexpr (std::is_integral_v<D> && std::is_integral_v<S>) {
    const S value = from_cell<S>(cell);
    return to_cell<D>(mode.has(SAT) ? clamped_integer<D>(value) : static_cast<D>(value));
  } else if constexpr (std::is_integral_v<D>) {
    const double value = S::read(cell, mode);
    if (!std::isnan(value)) return to_cell<D>(clamped<D>(to_integral(value, mode.rounding)));
    using Bits = std::make_unsigned_t<D>;
    constexpr auto GREATEST_BIT = static_cast<D>(static_cast<Bits>(Bits{1} << (8 * sizeof(D) - 1)));
    return std::is_same_v<S, Twice> || sizeof(D) == 8 ? to_cell<D>(GREATEST_BIT) : 0;
  } else {
    double value;
    if constexpr (std::is_integral_v<S>) {
      const Exact<double> parts = exact(from_cell<S>(cell));
      value = std::is_same_v<D, Twice> ? directed(parts.high, parts, mode.rounding) : to_odd(parts);
    } else {
      value = S::read(cell, mode);
      if (mode.has(INTEGRAL)) value = to_integral(value, mode.rounding);
    }
    if (mode.has(SAT)) value = saturated(value);
    if (mode.has(RELU)) value = rectified(value);
    return D::write(value, mode);
  }
}

template <class D, class S>
void convert_lanes(Warp& warp, const Operation& operation, uint32_t lanes) {
  CellOf<D>* const d = warp.lanes<CellOf<D>>(operation.slot[0]);
  const CellOf<S>* const a = warp.lanes<CellOf<S>>(operation.slot[1]);
  const Mode mode{static_cast<Rounding>(operation.option[0]), operation.option[1]};
  each_alone(lanes, [&](int lane) { d[lane] = convert<D, S>(a[lane], mode); });
}

// ---- the common ones, without modifiers but a rounding to nearest: loops that compilers vectorise ----

constexpr auto same = [](auto a) { return a; };
constexpr auto widen_half = [](uint16_t a) { return canonical(half_to_float(a)); };
constexpr auto widen_brain = [](uint16_t a) { return canonical(bfloat16_to_float(a)); };
constexpr auto narrow_half = [](float a) { return float_to_half(a); };
constexpr auto narrow_brain = [](float a) { return float_to_bfloat16(a); };
constexpr auto to_single = [](auto a) { return canonical(static_cast<float>(a)); };
// The bounds are floats: -2^31 is a number of s32, 2^31 none.
constexpr auto truncate_to_s32 = [](float a) {
  const bool inside = a >= -0x1p31f && a < 0x1p31f;
  const int32_t outside = a >= 0x1p31f ? INT32_MAX : a < 0 ? INT32_MIN : 0;
  return inside ? static_cast<int32_t>(inside ? a : 0.0f) : outside;
};

template <class D, class... S>
bool choose_integer(Type source, Operation& operation, Types<S...>) {
  return ((stands_for<S>(source) && (operation.run = lanewise<same, D, S>)) || ...);
}
template <class... D>
bool choose_integers(Type target, Type source, Operation& operation, Types<D...>) {
  using All = Types<uint8_t, uint16_t, uint32_t, uint64_t, int8_t, int16_t, int32_t, int64_t>;
  return ((stands_for<D>(target) && choose_integer<D>(source, operation, All())) || ...);
}

Handler common_handler(Type d, Type s) {
  if (d == Type::F32 && s == Type::F16) return lanewise<widen_half, float, uint16_t>;
  if (d == Type::F32 && s == Type::BF16) return lanewise<widen_brain, float, uint16_t>;
  if (d == Type::F16 && s == Type::F32) return lanewise<narrow_half, uint16_t, float>;
  if (d == Type::BF16 && s == Type::F32) return lanewise<narrow_brain, uint16_t, float>;
  if (d == Type::F32 && s == Type::S32) return lanewise<to_single, float, int32_t>;
  if (d == Type::F32 && s == Type::U32) return lanewise<to_single, float, uint32_t>;
  if (d == Type::F32 && s == Type::F64) return lanewise<to_single, float, double>;
  if (d == Type::F64 && s == Type::F32) return lanewise<same, double, float>;
  return nullptr;
}

// ---- choosing ----

template <class D, class... S>
Handler from(Type source, Types<S...>) {
  Handler handler = nullptr;
  ((stands_for<S>(source) && (handler = convert_lanes<D, S>)) || ...);
  return handler;
}

template <class D>
Handler from(Type source) {
  switch (source) {
    case Type::F16:
      return convert_lanes<D, Half>;
    case Type::BF16:
      return convert_lanes<D, Brain>;
    case Type::F32:
      return convert_lanes<D, Single>;
    case Type::F64:
      return convert_lanes<D, Twice>;
    default:
      return from<D>(source, Types<uint8_t, uint16_t, uint32_t, uint64_t, int8_t, int16_t, int32_t, int64_t>());
  }
}

Handler handler_of(Type target, Type source) {
  switch (target) {
    case Type::U8:
      return from<uint8_t>(source);
    case Type::U16:
      return from<uint16_t>(source);
    case Type::U32:
      return from<uint32_t>(source);
    case Type::U64:
      return from<uint64_t>(source);
    case Type::S8:
      return from<int8_t>(source);
    case Type::S16:
      return from<int16_t>(source);
    case Type::S32:
      return from<int32_t>(source);
    case Type::S64:
      return from<int64_t>(source);
    case Type::F16:
      return from<Half>(source);
    case Type::BF16:
      return from<Brain>(source);
    case Type::F32:
      return from<Single>(source);
    default:
      return from<Twice>(source);
  }
}

void set_mode(const Chosen& chosen, Operation& operation) {
  const int integral = chosen.one_of({"rni", "rzi", "rmi", "rpi"}, -1);
  const Rounding rounding = integral >= 0 ? static_cast<Rounding>(integral) : rounding_of(chosen);
  operation.option[0] = static_cast<uint8_t>(rounding);
  operation.option[1] = static_cast<uint8_t>((chosen.has("ftz") ? FTZ : 0) | (chosen.has("sat") ? SAT : 0) |
                                             (chosen.has("relu") ? RELU : 0) | (chosen.has("satfinite") ? FINITE : 0) |
                                             (integral >= 0 ? INTEGRAL : 0));
}

bool is_float(Type type) { return type == Type::F16 || type == Type::BF16 || type == Type::F32 || type == Type::F64; }
bool holds_all(Type target, Type source) {  // numbers of another floating-point type
  return target == source || target == Type::F64 || (target == Type::F32 && source != Type::F64);
}

// A row does not say which of its types comes first. A rounding is required where numbers may be lost, and illegal
// elsewhere (PTX ISA, cvt, "Integer Notes", "Floating Point Notes"); its example cvt.f64.bf16.rp has one where none is
// needed.
bool is_legal(const Chosen& chosen, Type target, Type source) {
  const bool rounds = chosen.one_of({"rn", "rz", "rm", "rp"}, -1) >= 0;
  const bool integral = chosen.one_of({"rni", "rzi", "rmi", "rpi"}, -1) >= 0;
  if (!is_float(target)) return integral && is_float(source);
  if (chosen.has("ftz") && target != Type::F32 && source != Type::F32) return false;
  if (chosen.has("sat") && target == Type::BF16) return false;
  if ((chosen.has("relu") || chosen.has("satfinite")) && source != Type::F32) return false;
  if (!is_float(source)) return rounds;
  if (integral) return target == source;
  if (!holds_all(target, source)) return rounds;
  return !rounds || (source == Type::BF16 && target != Type::BF16);
}

bool choose(const Chosen& chosen, Operation& operation) {
  const Type target = chosen.type(0), source = chosen.type(1);
  set_mode(chosen, operation);
  if (!is_legal(chosen, target, source)) return false;
  operation.run = handler_of(target, source);
  if (operation.option[1] == 0 && operation.option[0] == 0) {
    const Handler common = common_handler(target, source);
    if (common != nullptr) operation.run = common;
  }
  // Numbers below the least normal one are cut to 0 anyway.
  if (target == Type::S32 && source == Type::F32 && operation.option[0] == static_cast<int>(Rounding::ZERO)) {
    operation.run = lanewise<truncate_to_s32, int32_t, float>;
  }
  return true;
}
static_assert(static_cast<int>(Rounding::ZERO) == 1 && static_cast<int>(Rounding::DOWN) == 2 &&
                  static_cast<int>(Rounding::UP) == 3,
              "the order of rni, rzi, rmi, rpi");

// PTX ISA, cvt: .sat is illegal where the target holds every number of the source.
bool choose_integers(const Chosen& chosen, Operation& operation) {
  const Type target = chosen.type(0), source = chosen.type(1);
  if (!chosen.has("sat")) {
    return choose_integers(target, source, operation,
                           Types<uint8_t, uint16_t, uint32_t, uint64_t, int8_t, int16_t, int32_t, int64_t>());
  }
  const int to = bits_of(target) - is_signed(target), of = bits_of(source) - is_signed(source);
  if (to >= of && (is_signed(target) || !is_signed(source))) return false;
  set_mode(chosen, operation);
  operation.run = handler_of(target, source);
  return true;
}

const Form FORMS[] = {
    {"cvt", "u8|u16|u32|u64|s8|s16|s32|s64 u8|u16|u32|u64|s8|s16|s32|s64", "=0, 1", choose_integers},
    {"cvt", "sat u8|u16|u32|u64|s8|s16|s32|s64 u8|u16|u32|u64|s8|s16|s32|s64", "=0, 1", choose_integers},
    {"cvt", "rni|rzi|rmi|rpi ftz? sat? u8|u16|u32|u64|s8|s16|s32|s64 f32", "=0, 1", choose},
    {"cvt", "rni|rzi|rmi|rpi sat? u8|u16|u32|u64|s8|s16|s32|s64 f16|bf16|f64", "=0, 1", choose},
    {"cvt", "rn|rz|rm|rp ftz? sat? f32 u8|u16|u32|u64|s8|s16|s32|s64", "=0, 1", choose},
    {"cvt", "rn|rz|rm|rp sat? f16|f64 u8|u16|u32|u64|s8|s16|s32|s64", "=0, 1", choose},
    {"cvt", "rn|rz|rm|rp bf16 u8|u16|u32|u64|s8|s16|s32|s64", "=0, 1", choose},
    {"cvt", "ftz? sat? f32 f16|f32", "=0, 1", choose},
    {"cvt", "ftz? sat? f64 f32", "=0, 1", choose},
    {"cvt", "sat? f64 f16|f64", "=0, 1", choose},
    {"cvt", "sat? f16 f16", "=0, 1", choose},
    {"cvt", "bf16 bf16", "=0, 1", choose},
    {"cvt", "rn|rz|rm|rp? ftz? sat? f32 bf16", "=0, 1", choose},
    {"cvt", "rn|rz|rm|rp? sat? f64 bf16", "=0, 1", choose},
    {"cvt", "rn|rz|rm|rp ftz? sat? f32 f64", "=0, 1", choose},
    {"cvt", "rn|rz|rm|rp ftz? sat? f16 f32", "=0, 1", choose},
    {"cvt", "rn|rz|rm|rp sat? f16 bf16|f64", "=0, 1", choose},
    {"cvt", "rn|rz|rm|rp ftz? bf16 f32", "=0, 1", choose},
    {"cvt", "rn|rz|rm|rp bf16 f16|f64", "=0, 1", choose},
    {"cvt", "rn|rz relu? satfinite? f16|bf16 f32", "=0, 1", choose},
    {"cvt", "rni|rzi|rmi|rpi ftz? sat? f32 f32", "=0, 1", choose},
    {"cvt", "rni|rzi|rmi|rpi sat? f16 f16", "=0, 1", choose},
    {"cvt", "rni|rzi|rmi|rpi sat? f64 f64", "=0, 1", choose},
    {"cvt", "rni|rzi|rmi|rpi bf16 bf16", "=0, 1", choose},
};

}  // namespace

Forms convert_forms() {
  static const std::vector<Form> forms = join({FORMS, packed_convert_forms()});
  return forms;
}

}  // namespace sparse24::ptx
