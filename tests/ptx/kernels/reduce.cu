// *sum += all of x[count]: each thread sums every so many, each warp by shuffles, each block through shared memory, the
// blocks by an atomic.
__device__ float sum_of_warp(float value) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_down_sync(0xffffffff, value, distance);
  return value;
}

extern "C" __global__ void reduce(const float* __restrict__ x, float* sum, int count) {
  __shared__ float of_warp[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float value = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) value += x[i];
  value = sum_of_warp(value);
  if (lane == 0) of_warp[warp] = value;
  __syncthreads();
  if (warp == 0) {
    value = sum_of_warp(lane < blockDim.x / 32 ? of_warp[lane] : 0);
    if (lane == 0) atomicAdd(sum, value);
  }
}
