// y[i] = x[i] + ... + x[i + 3], zero beyond count: each block brings its stretch by cp.async of 4 bytes, one group for
// the stretch and one for the three elements after it.
#include <cuda_pipeline_primitives.h>

constexpr int THREADS = 128, AHEAD = 3;

extern "C" __global__ void moving_sum(const int* __restrict__ x, int* __restrict__ y, int count) {
  __shared__ int stretch[THREADS + AHEAD];
  const int thread = threadIdx.x, start = blockIdx.x * THREADS;
  auto bring = [&](int i) {
    const bool exists = start + i < count;
    __pipeline_memcpy_async(&stretch[i], exists ? &x[start + i] : x, 4, exists ? 0 : 4);
  };
  bring(thread);
  __pipeline_commit();
  if (thread < AHEAD) bring(THREADS + thread);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
  int sum = 0;
  for (int i = 0; i <= AHEAD; ++i) sum += stretch[thread + i];
  if (start + thread < count) y[start + thread] = sum;
}
