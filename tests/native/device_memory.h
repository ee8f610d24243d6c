// Device memory of the stand-in driver, for native tests; and the stand-in itself.
#pragma once
#include <dlfcn.h>

#include "csrc/cuda/driver_api.h"
#include "tests/native/check.h"
#include "tests/native/fake_libcuda.h"

namespace sparse24::test {

// With the shipped modules.
inline FakeCuda& fake() {
  static FakeCuda& state = [&]() -> FakeCuda& {
    void* library = dlopen("libcuda.so.1", RTLD_NOW);
    CHECK(library, dlerror());
    const auto get = reinterpret_cast<decltype(&fake_cuda)>(dlsym(library, "fake_cuda"));
    CHECK(get, "libcuda.so.1 is a real driver: set LD_LIBRARY_PATH to the stand-in's folder");
    get()->modules = cuda::modules();
    return *get();
  }();
  return state;
}

// A copy of `bytes` bytes at `host`, at an address that is a multiple of `alignment` and of no greater power of two.
class DeviceCopy {
 public:
  DeviceCopy(const void* host, size_t bytes, size_t alignment = 1, int device = 0)
      : device_(device), bytes_(bytes), offset_(alignment % 256) {
    const cuda::BoundContext context(device_);
    cuda::check(cuda::driver().cuMemAlloc(&base_, offset_ + bytes), "cuMemAlloc");
    cuda::check(cuda::driver().cuMemcpyHtoDAsync(base_ + offset_, host, bytes, nullptr), "cuMemcpyHtoDAsync");
  }
  ~DeviceCopy() {
    const cuda::BoundContext context(device_);
    CHECK(cuda::driver().cuMemFree(base_) == CUDA_SUCCESS);
  }
  DeviceCopy(const DeviceCopy&) = delete;

  template <class T>
  T* get() const {
    return reinterpret_cast<T*>(base_ + offset_);
  }
  void read(void* host) const {
    const cuda::BoundContext context(device_);
    cuda::check(cuda::driver().cuMemcpyDtoHAsync(host, base_ + offset_, bytes_, nullptr), "cuMemcpyDtoHAsync");
  }

 private:
  int device_;
  size_t bytes_, offset_;
  CUdeviceptr base_ = 0;
};

}  // namespace sparse24::test
