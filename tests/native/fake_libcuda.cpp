// A stand-in for libcuda.so.1: a small CUDA driver on top of the emulator. Device memory has the emulator's addresses;
// a cubin is recognised by the module that it belongs to, and runs that module's PTX, with all checks. It keeps a
// context a thread, as the driver does, and refuses what a driver would: a launch without a context, dynamic shared
// memory that was not asked for, an image for another device or a newer driver, and, while a stream captures a graph,
// whatever would wait or allocate.
#include "tests/native/fake_libcuda.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>

#include "csrc/ptx/api.h"

namespace {

using sparse24::cuda::Image;
using sparse24::cuda::Module;

FakeCuda state;
std::recursive_mutex mutex;
thread_local CUcontext current = nullptr;
thread_local CUstreamCaptureMode capture_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

constexpr int CUBINS_FROM = 13000, PTX_8_5_FROM = 12050;  // versions of CUDA

// ---- Contexts are numbers, one more than their device's ----

CUcontext context_of(int device) { return reinterpret_cast<CUcontext>(static_cast<uintptr_t>(device) + 1); }
int device_of(CUcontext context) { return static_cast<int>(reinterpret_cast<uintptr_t>(context)) - 1; }

// ---- Libraries ----

struct Library;
struct Kernel {
  Library* library;
  std::string name;
  std::map<int, int> dynamic_shared_bytes;  // allowed, by device
};
struct Library {
  const Module* module;
  const Image* image;  // null: PTX
  std::shared_ptr<sparse24_ptx_module> ptx;
  std::map<std::string, Kernel> kernels;
};
std::vector<std::unique_ptr<Library>> libraries;  // loaded, and freed with the process if not before

bool runs_on(const Image& image, int sm) {
  if (image.kind == 'a') return image.sm == sm;
  return image.sm / 10 == sm / 10 && image.sm % 10 <= sm % 10;
}

// ---- Device memory ----

struct Allocation {
  std::unique_ptr<char[]> host;
  size_t bytes;
};
std::map<CUdeviceptr, Allocation> allocations;

char* host_of(CUdeviceptr address, size_t bytes) {
  auto after = allocations.upper_bound(address);
  if (after == allocations.begin()) return nullptr;
  const auto& [begin, allocation] = *--after;
  return address - begin + bytes <= allocation.bytes ? allocation.host.get() + (address - begin) : nullptr;
}

// ---- What every entry point does first ----

CUresult enter(const char* name, bool needs_context = false, bool breaks_capture = false) {
  ++state.calls[name];
  const auto failure = state.failing.find(name);
  if (failure != state.failing.end()) return failure->second;
  if (needs_context && !current) return CUDA_ERROR_INVALID_CONTEXT;
  if (breaks_capture && !state.capturing.empty() && capture_mode != CU_STREAM_CAPTURE_MODE_RELAXED) {
    state.capture_broken = true;
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  return CUDA_SUCCESS;
}

#define ENTER(...)                   \
  const std::lock_guard lock(mutex); \
  if (const CUresult refused = enter(__func__ __VA_OPT__(, ) __VA_ARGS__)) return refused
constexpr bool IN_CONTEXT = true, BREAKS_CAPTURE = true;

CUresult run(const Kernel& kernel, const CUlaunchConfig& config, const std::vector<char>& arguments, int device) {
  sparse24_ptx_launch call{};
  call.grid[0] = config.gridDimX, call.grid[1] = config.gridDimY, call.grid[2] = config.gridDimZ;
  call.block[0] = config.blockDimX, call.block[1] = config.blockDimY, call.block[2] = config.blockDimZ;
  call.arguments = arguments.data();
  call.argument_bytes = arguments.size();
  call.dynamic_shared = config.sharedMemBytes;
  call.shared_limit = state.devices[device].shared_bytes_per_block;
  call.checks = 63;
  call.numerics = 1;
  call.threads = 2;
  sparse24_ptx_report* report = sparse24_ptx_run(kernel.library->ptx.get(), kernel.name.c_str(), &call);
  if (!report) {
    state.findings += sparse24_ptx_error();
    return CUDA_ERROR_INVALID_VALUE;
  }
  const bool silent = sparse24_ptx_finding_count(report) == 0;
  if (!silent) state.findings += sparse24_ptx_report_text(report);
  sparse24_ptx_discard(report);
  return silent ? CUDA_SUCCESS : CUDA_ERROR_ILLEGAL_ADDRESS;
}

// The driver knows the size of a kernel's parameters from its image.
size_t parameter_bytes(const Kernel& kernel) {
  const char* text = sparse24_ptx_describe_kernel(kernel.library->ptx.get(), kernel.name.c_str());
  return std::strtoull(std::strstr(text, "\"parameter_bytes\":") + std::strlen("\"parameter_bytes\":"), nullptr, 10);
}

}  // namespace

extern "C" {

FakeCuda* fake_cuda() { return &state; }

CUresult cuInit(unsigned) {
  ENTER();
  return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int* version) {
  *version = state.version;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult, const char** text) {
  *text = "an error of the stand-in";
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  ENTER();
  if (ordinal < 0 || ordinal >= static_cast<int>(state.devices.size())) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  ENTER();
  const FakeDevice& fake = state.devices[device];
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      return *value = fake.sm / 10, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      return *value = fake.sm % 10, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      return *value = fake.multiprocessors, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      return *value = fake.shared_bytes_per_block, CUDA_SUCCESS;
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  ENTER();
  *context = current;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice* device) {
  ENTER(IN_CONTEXT);
  *device = device_of(current);
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) {
  ENTER();
  current = context;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  ENTER();
  *context = context_of(device);
  return CUDA_SUCCESS;
}

CUresult cuLibraryLoadData(CUlibrary* out, const void* code, CUjit_option*, void**, unsigned, CUlibraryOption*, void**,
                           unsigned) {
  ENTER(!IN_CONTEXT, BREAKS_CAPTURE);
  auto library = std::make_unique<Library>();
  for (const Module* module : state.modules) {
    if (code == module->ptx) library->module = module;
    for (size_t i = 0; i < module->image_count; ++i) {
      if (code == module->images[i].cubin) library->module = module, library->image = &module->images[i];
    }
  }
  if (!library->module) return CUDA_ERROR_INVALID_IMAGE;
  if (!library->image && state.version < PTX_8_5_FROM) return CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
  const auto edited = state.edited_ptx.find(library->module->name);
  const char* text = edited != state.edited_ptx.end() ? edited->second.c_str() : library->module->ptx;
  library->ptx = {sparse24_ptx_load(text, std::strlen(text)), sparse24_ptx_unload};
  if (!library->ptx) return CUDA_ERROR_INVALID_PTX;
  *out = reinterpret_cast<CUlibrary>(libraries.emplace_back(std::move(library)).get());
  return CUDA_SUCCESS;
}
CUresult cuLibraryUnload(CUlibrary library) {
  ENTER();
  std::erase_if(libraries, [=](const auto& each) { return each.get() == reinterpret_cast<Library*>(library); });
  return CUDA_SUCCESS;
}
CUresult cuLibraryGetKernel(CUkernel* out, CUlibrary handle, const char* name) {
  ENTER();
  auto* const library = reinterpret_cast<Library*>(handle);
  if (!sparse24_ptx_describe_kernel(library->ptx.get(), name)) return CUDA_ERROR_NOT_FOUND;
  const auto kernel = library->kernels.try_emplace(name, Kernel{library, name, {}}).first;
  *out = reinterpret_cast<CUkernel>(&kernel->second);
  return CUDA_SUCCESS;
}
// Only here is it known which device an image must run on.
CUresult cuKernelGetFunction(CUfunction* function, CUkernel handle) {
  ENTER(IN_CONTEXT, BREAKS_CAPTURE);
  const Image* const image = reinterpret_cast<Kernel*>(handle)->library->image;
  if (image && (state.version < CUBINS_FROM || !runs_on(*image, state.devices[device_of(current)].sm))) {
    return CUDA_ERROR_NO_BINARY_FOR_GPU;
  }
  *function = reinterpret_cast<CUfunction>(handle);
  return CUDA_SUCCESS;
}
CUresult cuKernelSetAttribute(CUfunction_attribute attribute, int value, CUkernel kernel, CUdevice device) {
  ENTER();
  const bool fits = value <= state.devices[device].shared_bytes_per_block;
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || !fits) return CUDA_ERROR_INVALID_VALUE;
  reinterpret_cast<Kernel*>(kernel)->dynamic_shared_bytes[device] = value;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void**) {
  ENTER(IN_CONTEXT);
  const auto& kernel = *reinterpret_cast<Kernel*>(function);
  const int device = device_of(current);
  const auto allowed = kernel.dynamic_shared_bytes.find(device);
  const unsigned most = allowed != kernel.dynamic_shared_bytes.end() ? allowed->second : 48 << 10;
  if (config->sharedMemBytes > most) return CUDA_ERROR_INVALID_VALUE;
  if (kernel.library->image && !runs_on(*kernel.library->image, state.devices[device].sm)) {
    return CUDA_ERROR_NO_BINARY_FOR_GPU;
  }
  state.launches.push_back({kernel.name, device, config->hStream, config->sharedMemBytes, !kernel.library->image});
  const auto* const first = static_cast<const char*>(parameters[0]);
  const std::vector<char> arguments(first, first + parameter_bytes(kernel));
  if (state.capturing.contains(config->hStream)) {
    state.graph.push_back([&kernel, config = *config, arguments, device] { run(kernel, config, arguments, device); });
    return CUDA_SUCCESS;
  }
  return run(kernel, *config, arguments, device);
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  ENTER();
  std::swap(*mode, capture_mode);
  return CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  ENTER(IN_CONTEXT);
  if (!stream && !state.capturing.empty()) return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
  *status = state.capturing.contains(stream) ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
CUresult cuStreamCreate(CUstream* stream, unsigned) {
  ENTER(IN_CONTEXT);
  *stream = reinterpret_cast<CUstream>(new int);
  return CUDA_SUCCESS;
}
CUresult cuStreamDestroy(CUstream stream) {
  ENTER();
  delete reinterpret_cast<int*>(stream);
  return CUDA_SUCCESS;
}
CUresult cuStreamSynchronize(CUstream stream) {
  ENTER(IN_CONTEXT, BREAKS_CAPTURE);
  return state.capturing.contains(stream) ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS;
}

CUresult cuMemAlloc(CUdeviceptr* out, size_t bytes) {
  ENTER(IN_CONTEXT, BREAKS_CAPTURE);
  constexpr int ALIGNMENT = 256;  // CUDA C++ Programming Guide, "Device Memory Accesses"
  auto host = std::make_unique<char[]>(bytes);
  const uint64_t address = sparse24_ptx_allocate(host.get(), bytes, ALIGNMENT, 1);
  if (address == 0) return CUDA_ERROR_OUT_OF_MEMORY;
  allocations[*out = address] = {std::move(host), bytes};
  ++state.allocations;
  return CUDA_SUCCESS;
}
CUresult cuMemFree(CUdeviceptr address) {
  ENTER(IN_CONTEXT, BREAKS_CAPTURE);
  if (allocations.erase(address) == 0) return CUDA_ERROR_INVALID_VALUE;
  sparse24_ptx_free(address);
  --state.allocations;
  return CUDA_SUCCESS;
}
CUresult cuMemsetD8Async(CUdeviceptr address, unsigned char value, size_t bytes, CUstream) {
  ENTER(IN_CONTEXT);
  char* const to = host_of(address, bytes);
  if (!to) return CUDA_ERROR_INVALID_VALUE;
  std::memset(to, value, bytes);
  return CUDA_SUCCESS;
}
CUresult cuMemcpyHtoDAsync(CUdeviceptr address, const void* from, size_t bytes, CUstream) {
  ENTER(IN_CONTEXT);
  char* const to = host_of(address, bytes);
  if (!to) return CUDA_ERROR_INVALID_VALUE;
  std::memcpy(to, from, bytes);
  return CUDA_SUCCESS;
}
CUresult cuMemcpyDtoHAsync(void* to, CUdeviceptr address, size_t bytes, CUstream) {
  ENTER(IN_CONTEXT);
  const char* const from = host_of(address, bytes);
  if (!from) return CUDA_ERROR_INVALID_VALUE;
  std::memcpy(to, from, bytes);
  return CUDA_SUCCESS;
}

}  // extern "C"
