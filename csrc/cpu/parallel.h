// Parallel loops. Kernels call parallel_for; whoever links them says which threads run it: in the package, torch's
// pool.
#pragma once
#include <cstdint>

namespace sparse24::cpu {

using RangeBody = void (*)(int64_t begin, int64_t end, const void* context);

// Supplied by the program that links the kernels: csrc/ops.cpp or tests/native/.
void run_parallel(int64_t begin, int64_t end, int64_t grain, RangeBody body, const void* context);
int thread_count();

// Calls body(first, last) on disjoint ranges that cover [begin, end), each of at least `grain` where possible. A body
// must not throw. A range no longer than `grain` runs on the calling thread.
template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  if (begin >= end) return;
  run_parallel(
      begin, end, grain,
      [](int64_t first, int64_t last, const void* context) { (*static_cast<const Body*>(context))(first, last); },
      &body);
}

}  // namespace sparse24::cpu
