// What the machine can do at most, as JSON: `ceilings THREADS`.
//
// GFLOP/s (int8: GOP/s) of independent multiply-adds in registers, of all threads together: of 512 bits, or for
// bfloat16 and int8 of tiles where there is AMX ("tiles" is 1 then). And GB/s of reading memory that no cache holds, on
// huge pages where the system gives them. Each is the best of several short runs.
#include <cpuid.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

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

// ---- Tiles ----

bool has_tiles() {
  constexpr unsigned FEATURES = 1u << 22 | 1u << 24 | 1u << 25;  // leaf 7, EDX: AMX-BF16, AMX-TILE, AMX-INT8
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & FEATURES) != FEATURES) return false;
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

constexpr long TILE_LOOPS = LOOPS / 16;
constexpr double TILE_OPERATIONS = 4.0 * TILE_LOOPS * 2 * 16 * 16;  // times the columns of x in a tile: 32 or 64

// Numbers that differ: of zeros alone a tile costs less power, and runs faster.
void load_tiles() {
  struct alignas(64) {
    unsigned char palette = 1, other[15] = {};
    unsigned short row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } const config;
  alignas(64) unsigned short numbers[512];
  for (unsigned i = 0; i < 512; ++i) numbers[i] = static_cast<unsigned short>(0x3f80 + i * 2654435761u % 128);
  asm volatile("ldtilecfg %0" ::"m"(config));
  asm volatile("tileloadd (%0, %1, 1), %%tmm4\n tileloadd (%0, %1, 1), %%tmm5" ::"r"(numbers), "r"(64L) : "memory");
  asm volatile("tileloadd (%0, %1, 1), %%tmm6\n tileloadd (%0, %1, 1), %%tmm7" ::"r"(numbers), "r"(64L) : "memory");
}

#define FOUR_TILES(OP)                                                                            \
  OP " %%tmm6, %%tmm4, %%tmm0\n" OP " %%tmm7, %%tmm4, %%tmm1\n" OP " %%tmm6, %%tmm5, %%tmm2\n" OP \
     " %%tmm7, %%tmm5, %%tmm3"
#define TILE_PRODUCTS(NAME, OP)                                                     \
  void NAME() {                                                                     \
    load_tiles();                                                                   \
    for (long i = 0; i < TILE_LOOPS; ++i) asm volatile(FOUR_TILES(OP)::: "memory"); \
    asm volatile("tilerelease");                                                    \
  }
TILE_PRODUCTS(bfloat16_tiles, "tdpbf16ps")
TILE_PRODUCTS(int8_tiles, "tdpbusd")

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
  if (has_tiles()) {
    std::printf("\"tiles\": 1, ");
    std::printf("\"bfloat16\": %.1f, ", best_rate(threads, 40, 32 * TILE_OPERATIONS, [](int) { bfloat16_tiles(); }));
    std::printf("\"int8\": %.1f, ", best_rate(threads, 40, 64 * TILE_OPERATIONS, [](int) { int8_tiles(); }));
  } else {
    std::printf("\"bfloat16\": %.1f, ", best_rate(threads, 40, 64 * instructions, [](int) { bfloat16(); }));
    std::printf("\"int8\": %.1f, ", best_rate(threads, 40, 128 * instructions, [](int) { int8(); }));
  }
  std::printf("\"memory\": %.2f}\n", best_rate(threads, 6, BYTES, [&](int i) { read_all(buffers[i]); }));
}
