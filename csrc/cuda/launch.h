// A kernel launch as plain data: described once by the host code, run by one of two machines, the CUDA driver
// (csrc/cuda/driver.cpp) or the emulator (csrc/cuda/emulator.cpp).
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

namespace sparse24::cuda {

// One translation unit of kernels/, as CMakeLists.txt embeds it. Every cubin is assembled from `ptx`.
struct Image {
  int sm;     // 80, 90, ...; of the cubin
  char kind;  // 'a': this compute capability alone; 'f': its family (same major, this minor or later); 0: the same
  const unsigned char* cubin;
  size_t bytes;
};
struct Module {
  const char* name;  // the stem of the file
  const char* ptx;   // compute_80, PTX 8.5; zero-terminated
  const Image* images;
  size_t image_count;
};
extern const Module DECOMPRESS_MODULE, PACK_MODULE, QUANTIZE_MODULE, LINEAR_F16_MODULE, LINEAR_BF16_MODULE,
    LINEAR_S8_MODULE, LINEAR_FEW_MODULE, LINEAR_REDUCE_MODULE;
std::span<const Module* const> modules();  // all of them

struct Extent {
  unsigned x = 1, y = 1, z = 1;
};

// The bytes at `data` that a launch may touch, pointed to by the 8 bytes at `offset` of its arguments.
struct Range {
  size_t offset;
  void* data;
  uint64_t bytes;
  bool initialized;  // false: the launch writes them before it reads them
  size_t alignment;  // what `data` must be a multiple of
};

// Every kernel takes one struct by value, which holds device pointers and numbers.
struct Launch {
  const Module* module = nullptr;
  const char* kernel = nullptr;
  Extent grid, block;
  unsigned shared_bytes = 0;  // dynamic
  alignas(16) std::array<std::byte, 256> arguments{};
  size_t argument_bytes = 0;
  std::vector<Range> ranges;

  template <class Arguments>
  void pass(const Arguments& values) {
    static_assert(std::is_trivially_copyable_v<Arguments>, "a kernel's arguments are plain data");
    static_assert(sizeof values <= 256, "a launch has room for 256 bytes of arguments; widen `arguments` for more");
    std::memcpy(arguments.data(), &values, argument_bytes = sizeof values);
  }
  // What the pointer at `offset` in the arguments (offsetof) points to; a null pointer is left out.
  void reads(size_t offset, const void* data, uint64_t bytes, size_t alignment = 1) {
    if (data) ranges.push_back({offset, const_cast<void*>(data), bytes, true, alignment});
  }
  void writes(size_t offset, void* data, uint64_t bytes, size_t alignment = 1) {
    if (data) ranges.push_back({offset, data, bytes, false, alignment});
  }
};

// What a launch is planned for.
struct Device {
  int sm = 80;  // compute capability, major * 10 + minor
  int multiprocessors = 1;
  unsigned shared_bytes_per_block = 0;  // by opt-in
};

// Where a launch runs. A machine is cheap to make, and used by one thread.
class Machine {
 public:
  virtual ~Machine() = default;
  virtual Device device() const = 0;
  // Throws std::runtime_error with the machine's words.
  virtual void run(const Launch& launch) const = 0;
};

}  // namespace sparse24::cuda
