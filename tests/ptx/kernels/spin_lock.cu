// *total += x[i] of all threads, each in its turn: a lock that the lanes of one warp contend for.
extern "C" __global__ void spin_lock(const int* __restrict__ x, int* lock, int* total) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  bool done = false;
  while (!done) {
    if (atomicCAS(lock, 0, 1) == 0) {
      __threadfence();
      *(volatile int*)total = *(volatile int*)total + x[i];
      __threadfence();
      atomicExch(lock, 0);
      done = true;
    }
  }
}
