// Floating-point formats and roundings, exact and without the host's rounding mode: encode() rounds any double to any
// format; directed() corrects a nearest result by the sign of what rounding left out.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace sparse24::ptx {

enum class Rounding : uint8_t { NEAREST_EVEN, ZERO, DOWN, UP, NEAREST_AWAY };  // .rn .rz .rm .rp .rna

// What the codes of the greatest exponent mean.
enum class Top : uint8_t {
  INFINITY_AND_NAN,  // IEEE 754
  ONE_NAN,           // numbers, but for NaN where all bits are ones
  NUMBERS,           // numbers; there is no NaN
};

struct Format {
  int mantissa;      // bits after the point
  int exponent_min;  // of the smallest normal number
  int exponent_bits;
  Top top;
  constexpr int bits() const { return 1 + mantissa + exponent_bits; }
  constexpr uint32_t ones() const { return (1u << (mantissa + exponent_bits)) - 1; }  // all but the sign
  constexpr uint32_t infinity() const { return ones() ^ ((1u << mantissa) - 1); }     // INFINITY_AND_NAN
  constexpr uint32_t largest() const {
    return top == Top::INFINITY_AND_NAN ? infinity() - 1 : ones() - (top == Top::ONE_NAN);
  }
};
// PTX ISA, "Fundamental Types", "Alternate Floating-Point Data Formats". TENSOR32 is the upper part of an f32.
constexpr Format SINGLE{23, -126, 8, Top::INFINITY_AND_NAN}, HALF{10, -14, 5, Top::INFINITY_AND_NAN},
    BFLOAT16{7, -126, 8, Top::INFINITY_AND_NAN}, TENSOR32{10, -126, 8, Top::INFINITY_AND_NAN},
    E4M3{3, -6, 4, Top::ONE_NAN}, E5M2{2, -14, 5, Top::INFINITY_AND_NAN}, E2M3{3, 0, 2, Top::NUMBERS},
    E3M2{2, -2, 3, Top::NUMBERS}, E2M1{1, 0, 2, Top::NUMBERS};

constexpr float NAN_SINGLE = std::bit_cast<float>(0x7fffffffu);  // the canonical NaN of f32

// `value` rounded once. Overflow gives infinity or, where the rounding points to zero or `finite` is set, the largest
// number; so does infinity where `finite` is set. Formats without infinity give NaN instead, or the largest number if
// they have no NaN. NaN is all ones but the sign; without NaN, the largest number.
inline uint32_t encode(double value, const Format& format, Rounding rounding, bool finite = false) {
  constexpr int DIGITS = 52, BIAS = 1023;
  const uint64_t bits = std::bit_cast<uint64_t>(value), magnitude = bits & ~(uint64_t{1} << 63);
  const bool negative = bits >> 63;
  const uint32_t sign = static_cast<uint32_t>(negative) << (format.mantissa + format.exponent_bits);
  const uint32_t nan = format.top == Top::NUMBERS ? format.largest() : format.ones();
  const uint32_t overflow = finite ? format.largest() : format.top == Top::INFINITY_AND_NAN ? format.infinity() : nan;
  constexpr uint64_t INFINITE = uint64_t{0x7ff} << DIGITS;
  if (magnitude > INFINITE) return nan;
  if (magnitude == INFINITE) return sign | overflow;
  const int biased = static_cast<int>(magnitude >> DIGITS);
  const uint64_t hidden = static_cast<uint64_t>(biased != 0) << DIGITS;
  const uint64_t significand = (magnitude & ((uint64_t{1} << DIGITS) - 1)) | hidden;
  const int exponent = std::max(biased, 1) - BIAS, scale = std::max(exponent, format.exponent_min);
  // In units of the last place. A shift by 60 cuts off everything, and all of it is less than half a unit.
  const int shift = std::min(DIGITS - format.mantissa + scale - exponent, 60);
  uint64_t units = significand >> shift;
  const uint64_t rest = significand & ((uint64_t{1} << shift) - 1), middle = uint64_t{1} << (shift - 1);
  switch (rounding) {
    case Rounding::NEAREST_EVEN:
      units += rest > middle || (rest == middle && (units & 1) != 0);
      break;
    case Rounding::NEAREST_AWAY:
      units += rest >= middle;
      break;
    case Rounding::ZERO:
      break;
    case Rounding::DOWN:
      units += negative && rest != 0;
      break;
    case Rounding::UP:
      units += !negative && rest != 0;
      break;
  }
  // A carry out of the mantissa counts the exponent up by itself.
  const uint64_t encoded = (static_cast<uint64_t>(scale - format.exponent_min) << format.mantissa) + units;
  if (encoded <= format.largest()) return sign | static_cast<uint32_t>(encoded);
  const bool inwards = rounding == Rounding::ZERO || rounding == (negative ? Rounding::UP : Rounding::DOWN);
  return sign | (inwards ? format.largest() : overflow);
}

// Every format's numbers are floats.
inline float decode(uint32_t code, const Format& format) {
  const uint32_t magnitude = code & format.ones();
  const uint32_t sign = (code >> (format.mantissa + format.exponent_bits) & 1) << 31;
  if (format.top == Top::INFINITY_AND_NAN && magnitude >= format.infinity()) {
    return magnitude > format.infinity() ? NAN_SINGLE : std::bit_cast<float>(sign | 0x7f800000);
  }
  if (format.top == Top::ONE_NAN && magnitude == format.ones()) return NAN_SINGLE;
  // Scaling moves the exponent's bias, of subnormal numbers too.
  const float scale = std::bit_cast<float>(static_cast<uint32_t>(format.exponent_min + 126 + 127) << 23);
  const float value = std::bit_cast<float>(magnitude << (23 - format.mantissa)) * scale;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | sign);
}

// ---- the common conversions, without branches: compilers vectorise loops of them ----

// A NaN keeps its payload.
inline float half_to_float(uint32_t half) {
  const uint32_t magnitude = (half & 0x7fff) << 13;
  // Scaling by 2^112 moves the exponent's bias, of subnormal numbers too.
  const uint32_t finite = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000;
  return std::bit_cast<float>((magnitude >= 0x0f800000 ? special : finite) | ((half & 0x8000) << 16));
}

inline uint32_t float_to_half(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude + 0xc8000fff + (magnitude >> 13 & 1)) >> 13;
  // Adding 0.5, whose last place is the smallest half, rounds subnormal results.
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  uint32_t half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x477ff000 ? 0x7c00 : half;
  return magnitude > 0x7f800000 ? 0x7fff : half | sign;
}

// A NaN keeps its payload.
inline float bfloat16_to_float(uint32_t value) { return std::bit_cast<float>(value << 16); }

inline uint32_t float_to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fff : rounded;
}

// ---- arithmetic in other roundings ----

// An exact value as a sum of two; |low| is at most half a unit in the last place of `high`.
template <class Wide>
struct Exact {
  Wide high, low;
};

// Knuth's two-sum. `low` is NaN where `high` is not finite.
template <class Wide>
Exact<Wide> sum(Wide a, Wide b) {
  const Wide high = a + b, part = high - a;
  return {high, (a - (high - part)) + (b - part)};
}

// `nearest` is exact rounded to nearest: moved to the neighbour that `rounding` asks for.
template <class T, class Wide>
T directed(T nearest, const Exact<Wide>& exact, Rounding rounding) {
  const Wide difference = exact.high - static_cast<Wide>(nearest);
  const int below = difference != 0 ? (difference > 0) - (difference < 0) : (exact.low > 0) - (exact.low < 0);
  constexpr T INFINITE = std::numeric_limits<T>::infinity();
  const bool negative = exact.high < 0;
  const bool down = rounding == Rounding::DOWN || (rounding == Rounding::ZERO && !negative);
  const bool up = rounding == Rounding::UP || (rounding == Rounding::ZERO && negative);
  if (below < 0 && down) return std::nextafter(nearest, -INFINITE);  // the result is too great
  if (below > 0 && up) return std::nextafter(nearest, INFINITE);
  return nearest;
}

// Rounding to odd: the neighbour whose last bit is set stands for everything between two numbers. Rounding the result
// to two bits less, or fewer, gives what rounding the exact value gives (Boldo and Melquiond, 2008).
inline double to_odd(const Exact<double>& exact) {
  const uint64_t bits = std::bit_cast<uint64_t>(exact.high);
  const bool inexact = exact.low < 0 || exact.low > 0, outwards = (exact.low > 0) == (exact.high > 0);
  return std::bit_cast<double>(!inexact || (bits & 1) != 0 ? bits : outwards ? bits + 1 : bits - 1);
}
inline float to_odd_float(double value) {
  const float nearest = static_cast<float>(value);
  const uint32_t bits = std::bit_cast<uint32_t>(nearest);
  const bool too_great = std::fabs(static_cast<double>(nearest)) > std::fabs(value);
  return std::bit_cast<float>(static_cast<double>(nearest) != value ? (bits - too_great) | 1 : bits);
}

// ---- what modifiers do to a value ----

// .ftz: subnormal numbers become zeros of their sign.
template <class T>
T flushed(T value) {
  return std::fabs(value) < std::numeric_limits<float>::min() ? std::copysign(T{0}, value) : value;
}

// .sat: to [0, 1], +0 for NaN.
template <class T>
T saturated(T value) {
  value = value > 0 ? value : T{0};
  return value < 1 ? value : T{1};
}

// .relu: +0 for negative numbers and -0. NaN stays.
template <class T>
T rectified(T value) {
  return value <= 0 ? T{0} : value;
}

}  // namespace sparse24::ptx
