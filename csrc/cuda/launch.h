// A kernel launch as plain data: described once by the host code, run by the CUDA driver (csrc/cuda/driver.cpp).
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/format.cuh"

namespace sparse24::cuda {

// One translation unit of kernels/, as CMakeLists.txt embeds it.
struct Module {
  const unsigned char* fatbin;  // SASS for every shipped architecture
  const char* ptx;              // compute_80, for a driver that has no cubin for its device; zero-terminated
};
extern const Module DECOMPRESS_MODULE;

struct Extent {
  unsigned x = 1, y = 1, z = 1;
};

struct Launch {
  const Module* module;
  const char* kernel;
  Extent grid, block;
  unsigned shared_bytes = 0;
  std::array<uint64_t, 8> arguments{};  // each argument's bytes, low end first; pointers and integers of up to 8 bytes

  template <class... Arguments>
  void pass(Arguments... values) {
    static_assert(sizeof...(values) <= 8, "a launch has room for eight arguments; widen `arguments` for more");
    size_t i = 0;
    ((std::memcpy(&arguments[i++], &values, sizeof values)), ...);
  }
};

// Runs the launch on `stream` (a CUstream) of `device`. Throws std::runtime_error with the driver's words.
void run_on_driver(const Launch& launch, int device, void* stream);

// kernels/decompress.cu. Pointers are device pointers, all arrays contiguous; rows and in_features at least 1.
Launch describe_decompress(const void* values, const uint8_t* meta, void* dense, int64_t rows, int64_t in_features,
                           Element element, Pattern pattern);

}  // namespace sparse24::cuda
