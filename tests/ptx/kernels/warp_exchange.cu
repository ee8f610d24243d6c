// y = x with the bits of each index within 32 reversed: a warp exchanges its elements through shared memory, twice.
extern "C" __global__ void warp_exchange(const int* __restrict__ x, int* __restrict__ y) {
  __shared__ int cells[4][32];
  const int i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32;
  int* own = cells[threadIdx.x / 32];
  own[lane] = x[i];
  __syncwarp();
  int value = own[__brev(lane) >> 27];
  __syncwarp();  // all have read before anyone writes again
  own[31 - lane] = value;
  __syncwarp();
  y[i] = own[lane];
}
