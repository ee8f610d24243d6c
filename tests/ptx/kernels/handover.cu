// y = x reversed within each stretch of 32, by two warps: one brings stretches, the other takes them. Two places in
// shared memory, each with a barrier that says "full" and one that says "empty".
__device__ void arrive(int barrier) { asm volatile("bar.arrive %0, 64;" ::"r"(barrier) : "memory"); }
__device__ void wait(int barrier) { asm volatile("bar.sync %0, 64;" ::"r"(barrier) : "memory"); }
constexpr int FULL = 1, EMPTY = 3;  // barriers 1, 2 and 3, 4

extern "C" __global__ void handover(const int* __restrict__ x, int* __restrict__ y, int stretches) {
  __shared__ int places[2][32];
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    for (int i = 0; i < stretches; ++i) {
      if (i >= 2) wait(EMPTY + i % 2);
      places[i % 2][lane] = x[i * 32 + lane];
      arrive(FULL + i % 2);
    }
  } else {
    for (int i = 0; i < stretches; ++i) {
      wait(FULL + i % 2);
      y[i * 32 + lane] = places[i % 2][31 - lane];
      if (i + 2 < stretches) arrive(EMPTY + i % 2);
    }
  }
}
