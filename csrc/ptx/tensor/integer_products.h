// What both versions of the arithmetic do to integers alike. Included once by each; the anonymous namespace gives each
// its own copy, compiled for its own instruction set.
#pragma once
#include <algorithm>
#include <bit>
#include <limits>

#include "csrc/ptx/tensor/arithmetic.h"

namespace sparse24::ptx::tensor {
namespace {

// The sums have no more than 128 * 255 * 255 * 64: far from overflow. Only adding c can overflow.
inline void add_sums(const Multiplication& multiplication, const int32_t* sums, int32_t* c) {
  for (int n = 0; n < 8; ++n) {
    if (multiplication.satfinite) {
      const int64_t exact = int64_t{c[n]} + sums[n];
      c[n] = static_cast<int32_t>(
          std::clamp<int64_t>(exact, std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max()));
    } else {
      c[n] = static_cast<int32_t>(static_cast<uint32_t>(c[n]) + static_cast<uint32_t>(sums[n]));
    }
  }
}

inline void multiply_bits(const Multiplication& multiplication, int32_t* c) {
  const int high = multiplication.rows / 8;
  for (int m = 0; m < multiplication.rows; ++m) {
    int32_t sums[8] = {};
    for (int n = 0; n < 8; ++n) {
      for (int reg = 0; 128 * reg < multiplication.k; ++reg) {
        const uint32_t* a = multiplication.a[m / 8 + high * reg] + 4 * (m % 8);
        const uint32_t* b = multiplication.b[reg] + 4 * n;
        for (int i = 0; i < 4; ++i) sums[n] += std::popcount(multiplication.both_bits ? a[i] & b[i] : a[i] ^ b[i]);
      }
    }
    add_sums(multiplication, sums, c + 8 * m);
  }
}

}  // namespace
}  // namespace sparse24::ptx::tensor
