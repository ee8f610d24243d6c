// The int8 rounding rule, for what is quantised before it is packed: docs/architecture.md, sparse24/rounding.py.
#pragma once
#include <cstdint>

#include "kernels/format.cuh"

namespace sparse24::cpu {

// One instruction set's loops over `count` numbers, F32, F16 or BF16.
struct Quantizer {
  // The bits of the largest |x| as a float: in the order of the numbers, Inf and then NaN above the finite.
  uint32_t (*largest)(const void* x, Element element, int64_t count);
  // q = clamp(round-to-nearest-even(x / scale), -127, 127), NaN as 0; anything where scale is not finite.
  void (*quantize)(const void* x, Element element, int64_t count, float scale, int8_t* q);
};
const Quantizer& portable_quantizer();
const Quantizer& avx512_quantizer();
const Quantizer& quantizer();  // of the instruction set in use

// amax / 127; 1 where that is 0, NaN where amax is not finite.
SPARSE24_INLINE float scale_of(uint32_t amax_bits) {
  float amax;
  __builtin_memcpy(&amax, &amax_bits, sizeof amax);
  const float scale = amax / 127;
  return amax_bits >= 0x7f800000 ? __builtin_nanf("") : scale == 0 ? 1 : scale;
}

}  // namespace sparse24::cpu
