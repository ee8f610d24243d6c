// What the floating-point families share.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "csrc/ptx/isa.h"
#include "csrc/ptx/numbers.h"

namespace sparse24::ptx {

// Of float_forms().
Forms approximation_forms();  // approximate.cpp
Forms sign_forms();           // float_signs.cpp
// Of convert_forms().
Forms packed_convert_forms();  // convert_packed.cpp

// The rounding that one of the modifiers rn, rz, rm, rp, rna asks for; to nearest even without one.
inline Rounding rounding_of(const Chosen& chosen) {
  static constexpr Rounding ROUNDINGS[] = {Rounding::NEAREST_EVEN, Rounding::ZERO, Rounding::DOWN, Rounding::UP,
                                           Rounding::NEAREST_AWAY};
  return ROUNDINGS[chosen.one_of({"rn", "rz", "rm", "rp", "rna"}, 0)];
}

// NaN results of f32 are 0x7fffffff. The ISA does not say what those of f64 are: they are the host's.
template <class T>
T canonical(T value) {
  if constexpr (std::is_same_v<T, float>) return value != value ? NAN_SINGLE : value;
  return value;
}

// The greater or the lesser; -0 is less than +0. A NaN loses against a number, unless `nan` says that it wins.
template <class T>
T extremum_of(T a, T b, bool maximum, bool nan) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  const Bits x = std::bit_cast<Bits>(a), y = std::bit_cast<Bits>(b);
  T result = (maximum ? a > b : a < b) ? a : b;
  result = a == b ? std::bit_cast<T>(maximum ? x & y : x | y) : result;  // equal bits, or zeros
  result = a != a ? (nan ? a : b) : result;
  return b != b ? (nan ? b : a) : result;
}

// min and max with modifiers: of two values, or of three.
struct ExtremumMode {
  bool maximum, ftz, nan, absolute, xorsign;
};
template <class T, class... More>
T extremum_of(const ExtremumMode& mode, T a, T b, More... more) {
  const bool negative = std::signbit(a) != std::signbit(b);
  const auto prepared = [&](T value) { return mode.absolute ? std::fabs(value) : value; };
  T result = extremum_of(prepared(a), prepared(b), mode.maximum, mode.nan);
  ((result = extremum_of(result, prepared(more), mode.maximum, mode.nan)), ...);
  return mode.xorsign && result == result ? std::copysign(result, negative ? T{-1} : T{1}) : result;
}

}  // namespace sparse24::ptx
