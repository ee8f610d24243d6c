// What differs between the element types of W and x in the kernels of the linear product.
#pragma once
#include "ptx.cuh"

namespace sparse24 {

struct F16Weight {
  static constexpr int BITS = 16;
  using Sum = float;
  using Unit = uint16_t;                // an element's bits
  static constexpr int META_WORDS = 1;  // of a lane in one block of packed.cuh: for both steps, or one a step

  template <int STEP>
  static __device__ __forceinline__ void mma(Sum (&d)[4], const uint4& a, const uint32_t (&b)[4], uint32_t meta) {
    ptx::mma_sp_f16<STEP>(d, a, b, meta);
  }
};

struct BF16Weight : F16Weight {
  template <int STEP>
  static __device__ __forceinline__ void mma(Sum (&d)[4], const uint4& a, const uint32_t (&b)[4], uint32_t meta) {
    ptx::mma_sp_bf16<STEP>(d, a, b, meta);
  }
};

struct I8Weight {
  static constexpr int BITS = 8;
  using Sum = int32_t;
  using Unit = uint8_t;
  static constexpr int META_WORDS = 2;

  template <int STEP>
  static __device__ __forceinline__ void mma(Sum (&d)[4], const uint4& a, const uint32_t (&b)[4], uint32_t meta) {
    ptx::mma_sp_s8(d, a, b, meta);
  }
};

}  // namespace sparse24
