// y = activation(x W^T + bias) on the CPU, W in 2:4 and in the packed form of this family. No torch.
#pragma once
#include <cstdint>

#include "kernels/format.cuh"
#include "kernels/linear.cuh"

namespace sparse24::cpu {

using sparse24::Activation;

// Size in bytes of the packed form of W [out_features, in_features], element F32, F16, BF16 or I8.
int64_t packed_bytes(Element element, int64_t out_features, int64_t in_features);

// Canonical <-> packed, exact to the bit both ways; memory-safe for any bytes.
void pack(const void* values, const uint8_t* meta, Element element, int64_t out_features, int64_t in_features,
          uint8_t* packed);
void unpack(const uint8_t* packed, Element element, int64_t out_features, int64_t in_features, void* values,
            uint8_t* meta);

struct Linear {
  const void* x;           // [tokens, in_features], F32, F16 or BF16, unit inner stride
  int64_t x_stride;        // elements between rows of x, may be any value
  Element x_element;       // F32, F16 or BF16; also the type of y
  const uint8_t* packed;   // W, 64-byte aligned
  Element weight_element;  // F32, F16, BF16 or I8
  const float* scales;     // [out_features] for I8 weights, else null
  const void* bias;        // [out_features], or null
  Element bias_element;    // F32, F16 or BF16
  Activation activation;
  void* y;               // [tokens, out_features]
  int64_t y_stride;      // elements between rows of y
  int64_t tokens;        // M
  int64_t out_features;  // N
  int64_t in_features;   // K
};

// I8 weights: each row of x is quantised by its own s = amax / 127 (1 where that is 0), q =
// clamp(round-to-nearest-even( x / s), -127, 127), and y = float(sum q w) * (s * scales[n]) + bias, a float operation
// each. The sum is exact for in_features up to 2^18. A row that is not finite gives NaN. BF16 weights round x to
// bfloat16 first. Dropped entries of W take no part: Inf there gives no NaN. Any number of threads may call at once.
void linear(const Linear& call);

}  // namespace sparse24::cpu
