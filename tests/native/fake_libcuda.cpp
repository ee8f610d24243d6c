// A stand-in for libcuda.so.1. Its kernels are the sources of kernels/, compiled for the host; a launch runs every
// thread of the grid, one after another. It keeps a context a thread, as the driver does, and refuses what a driver
// would: a launch without a context, a grid beyond the limits, an image that is neither cubin nor PTX 8.5.
#include "tests/native/fake_libcuda.h"

#include <cuda.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <string>

#define __global__
#define __device__
#define __forceinline__ inline
static struct FakeExtent {
  unsigned x, y, z;
} threadIdx, blockIdx, gridDim;
#include "kernels/decompress.cu"
#undef __global__
#undef __device__
#undef __forceinline__

namespace {

using Run = void (*)(void** arguments);

// The arguments as the kernel's own types: a launch that passes others reads garbage and fails the comparison.
template <class... Parameters, size_t... I>
void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<Parameters*>(arguments[I])...);
}
template <auto KERNEL, class... Parameters>
void run_as(void (*)(Parameters...), void** arguments) {
  call(+KERNEL, arguments, std::index_sequence_for<Parameters...>{});
}
template <auto KERNEL>
void run(void** arguments) {
  run_as<KERNEL>(+KERNEL, arguments);
}

const std::map<std::string, Run> KERNELS = {
    {"decompress_b4", run<decompress_b4>},
    {"decompress_b8", run<decompress_b8>},
    {"decompress_b16", run<decompress_b16>},
    {"decompress_b32", run<decompress_b32>},
    {"decompress_pair_b8", run<decompress_pair_b8>},
    {"decompress_pair_b16", run<decompress_pair_b16>},
    {"decompress_pair_b32", run<decompress_pair_b32>},
};

thread_local CUcontext current = nullptr;
FakeCuda state;

CUcontext context_of(int device) { return reinterpret_cast<CUcontext>(static_cast<uintptr_t>(device) + 1); }
int device_of(CUcontext context) { return static_cast<int>(reinterpret_cast<uintptr_t>(context)) - 1; }

}  // namespace

extern "C" {

FakeCuda* fake_cuda() { return &state; }

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult, const char** text) {
  *text = "an error of the stand-in";
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = current;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice* device) {
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  *device = device_of(current);
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) {
  current = context;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = context_of(device);
  return CUDA_SUCCESS;
}

CUresult cuLibraryLoadData(CUlibrary* library, const void* code, CUjit_option*, void**, unsigned, CUlibraryOption*,
                           void**, unsigned) {
  constexpr uint32_t FATBIN_MAGIC = 0xBA55ED50;  // the first word of a fatbin, as nvcc writes it
  uint32_t magic;
  std::memcpy(&magic, code, sizeof magic);
  if (magic == FATBIN_MAGIC) {
    *library = reinterpret_cast<CUlibrary>(uintptr_t{1});
    return CUDA_SUCCESS;
  }
  if (!std::strstr(static_cast<const char*>(code), ".version 8.5")) return CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
  state.ptx_loads++;
  *library = reinterpret_cast<CUlibrary>(uintptr_t{2});
  return CUDA_SUCCESS;
}
CUresult cuLibraryUnload(CUlibrary) { return CUDA_SUCCESS; }
CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
  const auto found = KERNELS.find(name);
  if (found == KERNELS.end()) return CUDA_ERROR_NOT_FOUND;
  if (library == reinterpret_cast<CUlibrary>(uintptr_t{1}) && state.refuse_cubins)
    *kernel = nullptr;
  else
    *kernel = reinterpret_cast<CUkernel>(found->second);
  return CUDA_SUCCESS;
}
CUresult cuKernelGetFunction(CUfunction* function, CUkernel kernel) {
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  if (!kernel) return CUDA_ERROR_NO_BINARY_FOR_GPU;
  *function = reinterpret_cast<CUfunction>(kernel);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void**) {
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  const unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ;
  const bool empty = !config->gridDimX || !config->gridDimY || !config->gridDimZ || !threads;
  if (empty || threads > 1024 || config->gridDimX > 0x7fffffff || config->gridDimY > 65535 ||
      config->gridDimZ > 65535) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  state.launches++;
  state.last_device = device_of(current);
  state.last_stream = config->hStream;
  gridDim = {config->gridDimX, config->gridDimY, config->gridDimZ};
  const auto kernel = reinterpret_cast<Run>(function);
  for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
        for (threadIdx.z = 0; threadIdx.z < config->blockDimZ; ++threadIdx.z)
          for (threadIdx.y = 0; threadIdx.y < config->blockDimY; ++threadIdx.y)
            for (threadIdx.x = 0; threadIdx.x < config->blockDimX; ++threadIdx.x) kernel(arguments);
  return CUDA_SUCCESS;
}

}  // extern "C"
