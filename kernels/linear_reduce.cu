// Adds up the sums of a product whose K was split, in the order of the splits, and finishes them. Without splits it
// finishes zeros: the product of K = 0. One thread takes four output features of one token.
//
// Grid: x = ceil(reduce::threads / THREADS).
#include "epilogue.cuh"
#include "linear_reduce.cuh"

namespace sparse24::reduce {
namespace {

template <class Sum>
__device__ __forceinline__ void linear_reduce(const ReduceArguments& arguments) {
  const Epilogue& e = arguments.epilogue;
  const int64_t index = int64_t{blockIdx.x} * THREADS + threadIdx.x;
  const int quads = (e.out_features + QUAD - 1) / QUAD;
  const int64_t token = index / quads;
  const int feature = static_cast<int>(index % quads) * QUAD;
  if (token >= e.tokens) return;

  Sum sums[QUAD] = {};
  const Sum* from = static_cast<const Sum*>(arguments.partial) + token * e.out_features + feature;
  for (int split = 0; split < arguments.splits; ++split, from += int64_t{e.tokens} * e.out_features) {
    if (e.out_features % QUAD == 0) {
      Sum quad[QUAD];
      *reinterpret_cast<uint4*>(quad) = *reinterpret_cast<const uint4*>(from);
#pragma unroll
      for (int i = 0; i < QUAD; ++i) sums[i] += quad[i];
    } else {
#pragma unroll
      for (int i = 0; i < QUAD; ++i)
        if (feature + i < e.out_features) sums[i] += from[i];
    }
  }
  finish(e, static_cast<int>(token), feature, sums);
}

}  // namespace
}  // namespace sparse24::reduce

extern "C" __global__ void __launch_bounds__(sparse24::reduce::THREADS)
    linear_reduce_f32(const __grid_constant__ sparse24::ReduceArguments arguments) {
  sparse24::reduce::linear_reduce<float>(arguments);
}
extern "C" __global__ void __launch_bounds__(sparse24::reduce::THREADS)
    linear_reduce_i32(const __grid_constant__ sparse24::ReduceArguments arguments) {
  sparse24::reduce::linear_reduce<int32_t>(arguments);
}
