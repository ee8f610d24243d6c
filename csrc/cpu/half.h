// float16 and bfloat16 to float and back in plain C++, every bit pattern included.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

#include "kernels/format.cuh"

namespace sparse24::cpu {

SPARSE24_INLINE float f16_to_float(uint16_t half) {
  const uint32_t exponent = half >> 10 & 31, fraction = half & 1023, sign = static_cast<uint32_t>(half >> 15) << 31;
  if (exponent == 0) return std::copysign(static_cast<float>(fraction) * 0x1p-24f, std::bit_cast<float>(sign));
  return std::bit_cast<float>(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13);
}

SPARSE24_INLINE uint16_t float_to_f16(float value) {  // to nearest, ties to even
  const uint32_t bits = std::bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffff;
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return sign | 0x7e00;   // NaN
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and above round to Inf
  if (magnitude < 0x38800000) {                       // subnormal: the last bit of 0.5f weighs 2^-24, as theirs
    return sign | static_cast<uint16_t>(std::bit_cast<uint32_t>(std::fabs(value) + 0.5f) - 0x3f000000);
  }
  return sign | static_cast<uint16_t>((magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

SPARSE24_INLINE float bf16_to_float(uint16_t half) { return std::bit_cast<float>(static_cast<uint32_t>(half) << 16); }

SPARSE24_INLINE uint16_t float_to_bf16(float value) {  // to nearest, ties to even
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace sparse24::cpu
