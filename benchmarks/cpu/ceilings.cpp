// What the machine can do at most, as JSON: `ceilings THREADS`.
//
// GFLOP/s (int8: GOP/s) of independent 512-bit multiply-adds in registers, of all threads together, and GB/s of reading
// memory that no cache holds, on huge pages where the system gives them. Each is the best of several short runs.
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <thread>
#include <vector>

namespace {

constexpr long LOOPS = 300000;     // of 16 instructions: about a millisecond
constexpr size_t BYTES = 1 << 28;  // a thread's share of memory, more than any cache of today's cores

#define ON_16_REGISTERS(OP) \
  OP(0) OP(1) OP(2) OP(3) OP(4) OP(5) OP(6) OP(7) OP(8) OP(9) OP(10) OP(11) OP(12) OP(13) OP(14) OP(15)
#define CLOBBERS                                                                                                      \
  "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10", "zmm11", "zmm12", "zmm13", \
      "zmm14", "zmm15", "zmm31"
#define CLEAR(i) "vpxord %%zmm" #i ", %%zmm" #i ", %%zmm" #i "\n"
#define FLOAT32(i) "vfmadd231ps %%zmm31, %%zmm31, %%zmm" #i "\n"
#define BFLOAT16(i) "vdpbf16ps %%zmm31, %%zmm31, %%zmm" #i "\n"
#define INT8(i) "vpdpbusd %%zmm31, %%zmm31, %%zmm" #i "\n"
#define MULTIPLY_ADDS(NAME, OP)                                                     \
  __attribute__((target("avx512f"))) void NAME() {                                  \
    asm volatile(ON_16_REGISTERS(CLEAR) CLEAR(31)::: CLOBBERS);                     \
    for (long i = 0; i < LOOPS; ++i) asm volatile(ON_16_REGISTERS(OP)::: CLOBBERS); \
  }
MULTIPLY_ADDS(float32, FLOAT32)
MULTIPLY_ADDS(bfloat16, BFLOAT16)
MULTIPLY_ADDS(int8, INT8)

__attribute__((target("avx512f"))) void read_all(const char* data) {
  for (const char* p = data; p < data + BYTES; p += 256) {
    asm volatile("vmovups (%0), %%zmm0\n vmovups 64(%0), %%zmm1\n vmovups 128(%0), %%zmm2\n vmovups 192(%0), %%zmm3"
                 :
                 : "r"(p)
                 : "zmm0", "zmm1", "zmm2", "zmm3");
  }
}

// Work per nanosecond of all threads, each at its best, while the others do the same.
double best_rate(int threads, int runs, double work, const std::function<void(int)>& run) {
  std::vector<double> rates(threads, 0.0);
  std::vector<std::thread> pool;
  for (int thread = 0; thread < threads; ++thread) {
    pool.emplace_back([&, thread] {
      for (int i = 0; i < runs; ++i) {
        const auto start = std::chrono::steady_clock::now();
        run(thread);
        const std::chrono::duration<double, std::nano> taken = std::chrono::steady_clock::now() - start;
        rates[thread] = std::max(rates[thread], work / taken.count());
      }
    });
  }
  double sum = 0;
  for (int thread = 0; thread < threads; ++thread) pool[thread].join(), sum += rates[thread];
  return sum;
}

}  // namespace

int main(int count, char** arguments) {
  const int threads = count > 1 ? std::atoi(arguments[1]) : 1;
  std::vector<char*> buffers;
  for (int thread = 0; thread < threads; ++thread) {
    void* memory = mmap(nullptr, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return 1;
    madvise(memory, BYTES, MADV_HUGEPAGE);
    std::fill_n(static_cast<char*>(memory), BYTES, 1);
    buffers.push_back(static_cast<char*>(memory));
  }
  const double instructions = 16.0 * LOOPS;
  std::printf("{\"float32\": %.1f, ", best_rate(threads, 40, 32 * instructions, [](int) { float32(); }));
  std::printf("\"bfloat16\": %.1f, ", best_rate(threads, 40, 64 * instructions, [](int) { bfloat16(); }));
  std::printf("\"int8\": %.1f, ", best_rate(threads, 40, 128 * instructions, [](int) { int8(); }));
  std::printf("\"memory\": %.2f}\n", best_rate(threads, 6, BYTES, [&](int i) { read_all(buffers[i]); }));
}
