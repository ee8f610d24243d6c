#include "csrc/cuda/driver.h"

#include <map>
#include <mutex>
#include <stdexcept>

#include "csrc/cuda/driver_api.h"
#include "csrc/cuda/image.h"

namespace sparse24::cuda {

namespace {

// Asked once. A device keeps its attributes.
const Device& attributes_of(int device) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  const std::lock_guard lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;

  CUdevice handle;
  check(driver().cuDeviceGet(&handle, device), "cuDeviceGet", std::to_string(device).c_str());
  const auto ask = [handle](CUdevice_attribute attribute) {
    int value = 0;
    check(driver().cuDeviceGetAttribute(&value, attribute, handle), "cuDeviceGetAttribute");
    return value;
  };
  Device out;
  out.sm = 10 * ask(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) + ask(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
  out.multiprocessors = ask(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
  out.shared_bytes_per_block = ask(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
  return known[device] = out;
}

struct Kernel {
  CUkernel handle = nullptr;
  Resources resources;
};

// A module on one device. It stays loaded for as long as the process lives.
struct Loaded {
  CUlibrary library = nullptr;
  const Image* image = nullptr;  // null: compiled from the PTX
  std::map<std::string, Kernel, std::less<>> kernels;
};

// Loading is lazy: only cuKernelGetFunction, in a context of the device, tells whether an image will do.
CUresult load(const void* code, const char* kernel, CUlibrary& library) {
  const Driver& api = driver();
  CUlibrary loaded = nullptr;
  CUkernel handle = nullptr;
  CUfunction function = nullptr;
  CUresult result = api.cuLibraryLoadData(&loaded, code, nullptr, nullptr, 0, nullptr, nullptr, 0);
  if (result != CUDA_SUCCESS) return result;
  result = api.cuLibraryGetKernel(&handle, loaded, kernel);
  if (result == CUDA_SUCCESS) result = api.cuKernelGetFunction(&function, handle);
  if (result == CUDA_SUCCESS) {
    library = loaded;
  } else {
    api.cuLibraryUnload(loaded);
  }
  return result;
}

// A driver that refuses the cubin, too old for it or with a device it does not know, compiles the PTX.
void load_module(const Module& module, const char* kernel, const Device& device, Loaded& loaded) {
  const RelaxedCapture relaxed;
  loaded.image = choose_image(module, device.sm);
  if (loaded.image && load(loaded.image->cubin, kernel, loaded.library) == CUDA_SUCCESS) return;
  loaded.image = nullptr;
  const CUresult result = load(module.ptx, kernel, loaded.library);
  if (result == CUDA_ERROR_UNSUPPORTED_PTX_VERSION || result == CUDA_ERROR_INVALID_PTX) {
    throw DriverError(result,
                      "there is no cubin for sm_" + std::to_string(device.sm) +
                          " that the driver takes, and it cannot compile the PTX: " + version_needed(driver().version));
  }
  check(result, "cuLibraryLoadData, from PTX since no cubin will do,", kernel);
}

// Beyond this a kernel must be allowed to have dynamic shared memory (CUDA C++ Programming Guide, "Shared Memory").
constexpr unsigned SHARED_BYTES_ALLOWED = 48 * 1024;

Kernel load_kernel(const Loaded& loaded, const char* name, int device, const Device& attributes) {
  Kernel out;
  check(driver().cuLibraryGetKernel(&out.handle, loaded.library, name), "cuLibraryGetKernel", name);
  if (loaded.image) out.resources = resources_of(*loaded.image, name);
  const unsigned dynamic = attributes.shared_bytes_per_block - out.resources.shared_bytes;
  if (dynamic > SHARED_BYTES_ALLOWED) {
    CUdevice handle;
    check(driver().cuDeviceGet(&handle, device), "cuDeviceGet");
    check(driver().cuKernelSetAttribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, static_cast<int>(dynamic),
                                        out.handle, handle),
          "cuKernelSetAttribute for dynamic shared memory", name);
  }
  return out;
}

// A copy: the map may grow in another thread.
Kernel find_kernel(const Module& module, const char* name, int device) {
  static std::mutex mutex;
  static std::map<std::pair<const Module*, int>, Loaded> all;
  const Device& attributes = attributes_of(device);
  const std::lock_guard lock(mutex);
  Loaded& loaded = all[{&module, device}];
  if (!loaded.library) load_module(module, name, attributes, loaded);
  const auto found = loaded.kernels.find(std::string_view(name));
  if (found != loaded.kernels.end()) return found->second;
  return loaded.kernels[name] = load_kernel(loaded, name, device, attributes);
}

}  // namespace

DriverMachine::DriverMachine(int device, void* stream) : device_(device), stream_(stream) { attributes_of(device); }

Device DriverMachine::device() const { return attributes_of(device_); }

void DriverMachine::run(const Launch& launch) const {
  const BoundContext context(device_);
  const Kernel kernel = find_kernel(*launch.module, launch.kernel, device_);
  check_launch(launch, attributes_of(device_), kernel.resources);
  CUlaunchConfig config{};
  config.gridDimX = launch.grid.x, config.gridDimY = launch.grid.y, config.gridDimZ = launch.grid.z;
  config.blockDimX = launch.block.x, config.blockDimY = launch.block.y, config.blockDimZ = launch.block.z;
  config.sharedMemBytes = launch.shared_bytes;
  config.hStream = static_cast<CUstream>(stream_);
  void* arguments[] = {const_cast<std::byte*>(launch.arguments.data())};
  // cuda.h: a CUkernel may stand wherever a CUfunction is launched.
  check(driver().cuLaunchKernelEx(&config, reinterpret_cast<CUfunction>(kernel.handle), arguments, nullptr),
        "cuLaunchKernelEx", launch.kernel);
}

}  // namespace sparse24::cuda
