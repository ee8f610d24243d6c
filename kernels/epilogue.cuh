// What becomes of a sum: the Epilogue of linear.cuh, for four output features of one token at a time.
//
// Types, activation and presence are the same for the whole launch, so each branch goes one way. y, bias and residual
// are moved in one piece where their rows allow it, and element by element elsewhere.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "linear.cuh"

namespace sparse24 {

constexpr int QUAD = 4;  // features that are finished together

__device__ __forceinline__ int number_bytes(Number type) {
  return type == Number::I8 ? 1 : type == Number::F16 || type == Number::BF16 ? 2 : 4;
}

// Whether each row of a matrix that begins at `data` can be moved in quads.
__device__ __forceinline__ bool moves_in_quads(const void* data, int64_t stride, Number type) {
  const uint64_t bytes = reinterpret_cast<uint64_t>(data) | static_cast<uint64_t>(stride * number_bytes(type));
  return bytes % (QUAD * number_bytes(type)) == 0;
}

__device__ __forceinline__ float load_number(const void* data, Number type, int64_t index) {
  if (type == Number::F32) return static_cast<const float*>(data)[index];
  const uint16_t bits = static_cast<const uint16_t*>(data)[index];
  return type == Number::F16 ? __half2float(__ushort_as_half(bits)) : __uint_as_float(uint32_t{bits} << 16);
}

// v[i] += data[index + i] for i < count. `quads`: four at once are aligned.
__device__ __forceinline__ void add_numbers(float (&v)[QUAD], const void* data, Number type, int64_t index, bool quads,
                                            int count) {
  if (quads && count == QUAD) {
    if (type == Number::F32) {
      const float4 x = *reinterpret_cast<const float4*>(static_cast<const float*>(data) + index);
      v[0] += x.x, v[1] += x.y, v[2] += x.z, v[3] += x.w;
    } else {
      const uint2 bits = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(data) + index);
      const uint32_t words[2] = {bits.x, bits.y};
#pragma unroll
      for (int i = 0; i < QUAD; ++i) {
        const uint32_t half = i % 2 == 0 ? words[i / 2] & 0xffff : words[i / 2] >> 16;
        v[i] += type == Number::F16 ? __half2float(__ushort_as_half(static_cast<uint16_t>(half)))
                                    : __uint_as_float(half << 16);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < QUAD; ++i)
      if (i < count) v[i] += load_number(data, type, index + i);
  }
}

// In float32, within 2^-20 |x| of the exact value: measured over all finite float16 x in the emulator
// (tests/kernels/test_epilogue.py). Relative to results that are tiny beside x it is worse; below 1e-36 they may be 0.
__device__ __forceinline__ float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::RELU:
      return x < 0 ? 0 : x;  // a NaN stays
    case Activation::GELU:
      return x * 0.5f * erfcf(x * -0.70710678f);  // 1 + erf would cancel for negative x
    case Activation::GELU_TANH:
      return __fdividef(x, 1 + expf(-1.5957691f * (x + 0.044715f * x * x * x)));
    case Activation::SILU:
      return __fdividef(x, 1 + expf(-x));
    default:
      return x;
  }
}

// Round half to even, within [-127, 127]; a NaN becomes 0.
__device__ __forceinline__ int32_t quantized(float x, float scale) {
  const float q = rintf(__fdiv_rn(x, scale));
  return q == q ? static_cast<int32_t>(fminf(fmaxf(q, -127.0f), 127.0f)) : 0;
}

__device__ __forceinline__ uint32_t half_bits(float x, Number type) {
  return type == Number::F16 ? __half_as_ushort(__float2half_rn(x)) : __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

// Four words, bit by bit what goes into y, each in the low bits of its own.
__device__ __forceinline__ void store_words(void* data, Number type, int64_t index, const uint32_t (&words)[QUAD],
                                            bool quads, int count) {
  const int bytes = number_bytes(type);
  uint8_t* const to = static_cast<uint8_t*>(data) + index * bytes;
  if (quads && count == QUAD) {
    if (bytes == 4) {
      *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    } else if (bytes == 2) {
      *reinterpret_cast<uint2*>(to) = make_uint2(words[0] | (words[1] << 16), words[2] | (words[3] << 16));
    } else {
      *reinterpret_cast<uint32_t*>(to) =
          __byte_perm(__byte_perm(words[0], words[1], 0x0040), __byte_perm(words[2], words[3], 0x0040), 0x5410);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < QUAD; ++i) {
    if (i >= count) continue;
    if (bytes == 4) reinterpret_cast<uint32_t*>(to)[i] = words[i];
    if (bytes == 2) reinterpret_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(words[i]);
    if (bytes == 1) to[i] = static_cast<uint8_t>(words[i]);
  }
}

// Finishes and stores the sums of features `feature` to `feature` + 3 of one token; those beyond the matrix are
// dropped. `feature` is a multiple of four.
template <class Sum>
__device__ __forceinline__ void finish(const Epilogue& e, int token, int feature, const Sum (&sums)[QUAD]) {
  const int count = min(e.out_features - feature, QUAD);
  if (token >= e.tokens || count <= 0) return;

  uint32_t words[QUAD];
  if (e.y_type == Number::I32) {
#pragma unroll
    for (int i = 0; i < QUAD; ++i) words[i] = static_cast<uint32_t>(static_cast<int32_t>(sums[i]));
  } else {
    float v[QUAD];
#pragma unroll
    for (int i = 0; i < QUAD; ++i) v[i] = static_cast<float>(sums[i]);
    if (e.scales != nullptr) {
      const float x_scale = e.x_scales[int64_t{token} * e.x_scale_step];
#pragma unroll
      for (int i = 0; i < QUAD; ++i)
        if (i < count) v[i] = __fmul_rn(v[i], __fmul_rn(x_scale, e.scales[feature + i]));
    }
    if (e.bias != nullptr) add_numbers(v, e.bias, e.bias_type, feature, moves_in_quads(e.bias, 0, e.bias_type), count);
    if (e.residual != nullptr) {
      const bool quads = moves_in_quads(e.residual, e.residual_stride, e.residual_type);
      add_numbers(v, e.residual, e.residual_type, token * e.residual_stride + feature, quads, count);
    }
    if (e.activation != Activation::NONE) {
#pragma unroll 1  // four copies would be half of the kernel's code
      for (int i = 0; i < QUAD; ++i) {
        const float x = activate(v[0], e.activation);
        v[0] = v[1], v[1] = v[2], v[2] = v[3], v[3] = x;
      }
    }
    if (e.y_type == Number::I8) {
      const float scale = *e.y_scale;
#pragma unroll
      for (int i = 0; i < QUAD; ++i) words[i] = static_cast<uint32_t>(quantized(v[i], scale));
    } else {
#pragma unroll
      for (int i = 0; i < QUAD; ++i)
        words[i] = e.y_type == Number::F32 ? __float_as_uint(v[i]) : half_bits(v[i], e.y_type);
    }
  }
  store_words(e.y, e.y_type, token * e.y_stride + feature, words, moves_in_quads(e.y, e.y_stride, e.y_type), count);
}

// As finish(), or, where K is split, as this split's sums.
template <class Sum>
__device__ __forceinline__ void store(const LinearArguments& arguments, int token, int feature,
                                      const Sum (&sums)[QUAD]) {
  const Epilogue& e = arguments.epilogue;
  if (arguments.partial == nullptr) return finish(e, token, feature, sums);
  if (token >= e.tokens || feature >= e.out_features) return;
  const int64_t row = int64_t{blockIdx.z} * e.tokens + token;
  static_assert(sizeof(Sum) == 4, "sums are float or int32_t");
  uint32_t words[QUAD];
  memcpy(words, sums, sizeof words);
  store_words(arguments.partial, Number::F32, row * e.out_features + feature, words, e.out_features % QUAD == 0,
              min(e.out_features - feature, QUAD));
}

}  // namespace sparse24
