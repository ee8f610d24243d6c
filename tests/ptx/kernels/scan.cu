// y = inclusive prefix sums of x, a block of up to 1024 threads for each stretch of blockDim.x elements.
extern "C" __global__ void scan(const int* __restrict__ x, int* __restrict__ y, int count) {
  __shared__ int of_warp[32];
  const int i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int value = i < count ? x[i] : 0;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int before = __shfl_up_sync(0xffffffff, value, distance);
    if (lane >= distance) value += before;
  }
  if (lane == 31) of_warp[warp] = value;
  __syncthreads();
  for (int w = 0; w < warp; ++w) value += of_warp[w];
  if (i < count) y[i] = value;
}
