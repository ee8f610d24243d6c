// The thread pool of the native tests: plain threads, as many as set_thread_count() says.
#include "csrc/cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "tests/native/parallel.h"

namespace sparse24 {

static std::atomic<int> threads = 2;

namespace test {
void set_thread_count(int count) { threads = count; }
}  // namespace test

namespace cpu {

int thread_count() { return threads; }

void run_parallel(int64_t begin, int64_t end, int64_t grain, RangeBody body, const void* context) {
  const int64_t size = end - begin;
  const int64_t tasks = std::clamp<int64_t>(size / std::max<int64_t>(grain, 1), 1, thread_count());
  std::vector<std::thread> pool;
  for (int64_t task = 1; task < tasks; ++task) {
    pool.emplace_back(body, begin + size * task / tasks, begin + size * (task + 1) / tasks, context);
  }
  body(begin, begin + size / tasks, context);
  for (std::thread& thread : pool) thread.join();
}

}  // namespace cpu
}  // namespace sparse24
