// counts[keys] += how often each key occurs: the lanes with the same key send one of them.
extern "C" __global__ void count_keys(const int* __restrict__ keys, int* counts, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const unsigned present = __ballot_sync(0xffffffff, i < count);
  if (i < count) {
    const unsigned same = __match_any_sync(present, keys[i]);
    if (__ffs(same) - 1 == threadIdx.x % 32) atomicAdd(&counts[keys[i]], __popc(same));
  }
}
