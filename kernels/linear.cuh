// What all kernels of y = activation(x W^T + bias + residual) are given, in one struct, passed by value.
#pragma once
#include <cstdint>

namespace sparse24 {

enum class Activation : int32_t { NONE, RELU, GELU, GELU_TANH, SILU };
enum class Number : int32_t { F32, F16, BF16, I8, I32 };  // of an element of y, bias or residual

// What becomes of a sum of products, for output feature n of token m, in float32, one operation after the other:
//   v = sum * (x_scales[m] * scales[n])    where there are scales
//   v = total * x_scales[m]                where groups of columns have scales of their own: total = 0, then for each
//                                          group, in order, total = total + (sum of the group) * scales[group, n]
//   v = v + bias[n] + residual[m, n]       as far as given
//   v = activation(v)
//   y = v rounded to nearest even; for I8: clamp(rne(v / *y_scale), -127, 127), a NaN becomes 0
// I32 takes none of this: y is the sum.
struct Epilogue {
  void* y;                // [tokens, out_features]
  const void* bias;       // [out_features], or null
  const void* residual;   // [tokens, out_features], or null
  const float* scales;    // [out_features], or [groups, out_features], of an integer weight, else null
  const float* x_scales;  // [tokens], or [1] with x_scale_step 0; null as `scales`
  const float* y_scale;   // [1] for I8, else null
  int64_t y_stride;       // elements between rows
  int64_t residual_stride;
  Number y_type, bias_type, residual_type;
  Activation activation;
  int32_t x_scale_step;  // 0: one scale for all tokens, 1: one a token
  int32_t out_features;  // N
  int32_t tokens;        // M
};

struct LinearArguments {
  const uint8_t* packed;  // W, kernels/packed.cuh; 16-byte aligned
  const void* x;          // [tokens, in_features] of W's element type
  int64_t x_stride;       // bytes between rows
  void* partial;          // split-K: float32 or int32 [splits, tokens, out_features], else null. The kernel then writes
                          // sums here, and linear_reduce does the epilogue
  int32_t in_features;    // K
  int32_t row_blocks;     // of packed
  int32_t column_blocks;  // of packed
  int32_t split_blocks;   // column blocks of each split; blockIdx.z is the split
  Epilogue epilogue;
};

// Sums the splits in order, so that the result does not depend on timing, and does the epilogue.
struct ReduceArguments {
  const void* partial;
  int32_t splits;
  Epilogue epilogue;
};

// x of float type to int8, a scale a row: s = amax / 127 (1 where that is 0), q = clamp(rne(x / s), -127, 127). A row
// that is not finite gets the scale NaN and q = 0.
struct QuantizeArguments {
  const void* x;     // [tokens, in_features], F32, F16 or BF16
  int64_t x_stride;  // elements between rows
  int8_t* q;         // [tokens, q_stride], zeros from in_features on
  int64_t q_stride;  // a multiple of 16
  float* scales;     // [tokens]
  Number x_type;
  int32_t in_features, tokens;
};

// Canonical -> packed and back (kernels/packed.cuh). One thread a word of a block.
struct PackArguments {
  void* values;     // [out_features, 2 * ceil(in_features / 4)]
  uint8_t* meta;    // [out_features, ceil(ceil(in_features / 4) / 2)]
  uint8_t* packed;  // packed::bytes
  int64_t out_features, in_features;
};

}  // namespace sparse24
