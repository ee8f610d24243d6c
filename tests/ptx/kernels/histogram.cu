// bins[64] += how often each value of x occurs: counted by shared atomics in each block, then added by global ones.
#include <cstdint>

constexpr int BINS = 64;

extern "C" __global__ void histogram(const uint8_t* __restrict__ x, int* bins, int count) {
  __shared__ int own[BINS];
  for (int i = threadIdx.x; i < BINS; i += blockDim.x) own[i] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x)
    atomicAdd(&own[x[i] % BINS], 1);
  __syncthreads();
  for (int i = threadIdx.x; i < BINS; i += blockDim.x)
    if (own[i] != 0) atomicAdd(&bins[i], own[i]);
}
