// Launches through the CUDA driver, which is found in libcuda.so.1 on first use: the library loads without one.
//
// A driver launch runs in the calling thread's context. Autograd's worker threads start without one, or with another
// device's, so every launch binds the device's primary context first (pytorch/pytorch#124565).
#include <cuda.h>
#include <dlfcn.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "csrc/cuda/launch.h"

namespace sparse24::cuda {

namespace {

struct Driver {
  decltype(&cuInit) init;
  decltype(&cuGetErrorString) error_string;
  decltype(&cuCtxGetCurrent) ctx_get_current;
  decltype(&cuCtxGetDevice) ctx_get_device;
  decltype(&cuCtxSetCurrent) ctx_set_current;
  decltype(&cuDevicePrimaryCtxRetain) primary_ctx_retain;
  decltype(&cuLibraryLoadData) library_load_data;
  decltype(&cuLibraryUnload) library_unload;
  decltype(&cuLibraryGetKernel) library_get_kernel;
  decltype(&cuKernelGetFunction) kernel_get_function;
  decltype(&cuLaunchKernelEx) launch_kernel;

  static const Driver& get() {
    static const Driver driver;
    return driver;
  }

  void check(CUresult result, const std::string& call) const {
    if (result == CUDA_SUCCESS) return;
    const char* text = nullptr;
    error_string(result, &text);
    throw std::runtime_error(call + " failed: " + (text ? text : "unknown error") + " (" +
                             std::to_string(static_cast<int>(result)) + ")");
  }

 private:
  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) throw std::runtime_error(std::string("there is no CUDA driver: ") + dlerror());
    const auto find = [library](auto& entry, const char* name) {
      entry = reinterpret_cast<std::decay_t<decltype(entry)>>(dlsym(library, name));
      if (!entry)
        throw std::runtime_error(std::string("libcuda.so.1 has no ") + name + "; CUDA 12.0 or newer is needed");
    };
    find(init, "cuInit");
    find(error_string, "cuGetErrorString");
    find(ctx_get_current, "cuCtxGetCurrent");
    find(ctx_get_device, "cuCtxGetDevice");
    find(ctx_set_current, "cuCtxSetCurrent");
    find(primary_ctx_retain, "cuDevicePrimaryCtxRetain");
    find(library_load_data, "cuLibraryLoadData");
    find(library_unload, "cuLibraryUnload");
    find(library_get_kernel, "cuLibraryGetKernel");
    find(kernel_get_function, "cuKernelGetFunction");
    find(launch_kernel, "cuLaunchKernelEx");
    check(init(0), "cuInit");
  }
};

void bind_context(const Driver& driver, int device) {
  CUcontext context = nullptr;
  driver.check(driver.ctx_get_current(&context), "cuCtxGetCurrent");
  CUdevice current = -1;
  if (context) driver.check(driver.ctx_get_device(&current), "cuCtxGetDevice");
  if (context && current == device) return;
  driver.check(driver.primary_ctx_retain(&context, device), "cuDevicePrimaryCtxRetain");
  driver.check(driver.ctx_set_current(context), "cuCtxSetCurrent");
}

// A driver that refuses the cubins (too old for them, or a device they do not know) compiles the PTX. Loading is lazy:
// only cuKernelGetFunction, for the device that is current, tells whether an image will do.
CUkernel load_kernel(const Driver& driver, const Module& module, const char* name) {
  CUresult result = CUDA_SUCCESS;
  for (const void* image : {static_cast<const void*>(module.fatbin), static_cast<const void*>(module.ptx)}) {
    CUlibrary library = nullptr;
    CUkernel kernel = nullptr;
    CUfunction function = nullptr;
    result = driver.library_load_data(&library, image, nullptr, nullptr, 0, nullptr, nullptr, 0);
    if (result == CUDA_SUCCESS) result = driver.library_get_kernel(&kernel, library, name);
    if (result == CUDA_SUCCESS) result = driver.kernel_get_function(&function, kernel);
    if (result == CUDA_SUCCESS) return kernel;
    if (library) driver.library_unload(library);
  }
  driver.check(result, std::string("loading ") + name + " from its cubins and then from its PTX 8.5");
  return nullptr;
}

// Kernels stay loaded as long as the process lives.
CUkernel find_kernel(const Driver& driver, const Module& module, const char* name, int device) {
  static std::mutex mutex;
  static std::map<std::tuple<const Module*, std::string, int>, CUkernel> kernels;
  const std::lock_guard lock(mutex);
  CUkernel& kernel = kernels[{&module, name, device}];
  if (!kernel) kernel = load_kernel(driver, module, name);
  return kernel;
}

}  // namespace

void run_on_driver(const Launch& launch, int device, void* stream) {
  const Driver& driver = Driver::get();
  bind_context(driver, device);
  CUlaunchConfig config{};
  config.gridDimX = launch.grid.x, config.gridDimY = launch.grid.y, config.gridDimZ = launch.grid.z;
  config.blockDimX = launch.block.x, config.blockDimY = launch.block.y, config.blockDimZ = launch.block.z;
  config.sharedMemBytes = launch.shared_bytes;
  config.hStream = static_cast<CUstream>(stream);
  std::array<void*, 8> arguments;
  for (size_t i = 0; i < arguments.size(); ++i) arguments[i] = const_cast<uint64_t*>(&launch.arguments[i]);
  // cuda.h: a CUkernel may stand wherever a CUfunction is launched.
  const auto kernel = reinterpret_cast<CUfunction>(find_kernel(driver, *launch.module, launch.kernel, device));
  driver.check(driver.launch_kernel(&config, kernel, arguments.data(), nullptr),
               std::string("cuLaunchKernelEx ") + launch.kernel);
}

}  // namespace sparse24::cuda
