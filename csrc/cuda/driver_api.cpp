#include "csrc/cuda/driver_api.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <type_traits>

namespace sparse24::cuda {

namespace {

#define SPARSE24_TEXT_(NAME) #NAME
#define SPARSE24_TEXT(NAME) SPARSE24_TEXT_(NAME)  // cuda.h renames some: cuMemAlloc is cuMemAlloc_v2

std::string version_text(int version) {
  return std::to_string(version / 1000) + '.' + std::to_string(version % 1000 / 10);
}

[[noreturn]] void fail(const Driver& api, CUresult result, const std::string& call) {
  const char* text = nullptr;
  api.cuGetErrorString(result, &text);
  throw DriverError(result, call + " failed: " + (text ? text : "unknown error") + " (" +
                                std::to_string(static_cast<int>(result)) + ")");
}

Driver open() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(std::string("there is no CUDA driver: ") + dlerror());
  Driver found{};
  const auto find = [&](auto& entry, const char* name) {
    entry = reinterpret_cast<std::decay_t<decltype(entry)>>(dlsym(library, name));
    return entry != nullptr;
  };
  decltype(&::cuDriverGetVersion) get_version = nullptr;
  if (find(get_version, "cuDriverGetVersion")) get_version(&found.version);
#define SPARSE24_FIND(NAME)                                                                                    \
  if (!find(found.NAME, SPARSE24_TEXT(NAME))) {                                                                \
    throw std::runtime_error("libcuda.so.1 has no " SPARSE24_TEXT(NAME) ": " + version_needed(found.version)); \
  }
  SPARSE24_DRIVER_CALLS(SPARSE24_FIND)
#undef SPARSE24_FIND
  if (const CUresult result = found.cuInit(0); result != CUDA_SUCCESS) fail(found, result, "cuInit");
  return found;
}

// Retained once, for as long as the process lives.
CUcontext primary_context(int device) {
  static std::mutex mutex;
  static std::map<int, CUcontext> contexts;
  const std::lock_guard lock(mutex);
  CUcontext& context = contexts[device];
  if (!context) {
    CUdevice handle;
    check(driver().cuDeviceGet(&handle, device), "cuDeviceGet", std::to_string(device).c_str());
    check(driver().cuDevicePrimaryCtxRetain(&context, handle), "cuDevicePrimaryCtxRetain");
  }
  return context;
}

}  // namespace

const Driver& driver() {
  static const Driver opened = open();
  return opened;
}

void check(CUresult result, const char* call, const char* of) {
  if (result != CUDA_SUCCESS) fail(driver(), result, std::string(call) + (of ? std::string(" of '") + of + "'" : ""));
}

std::string version_needed(int version) {
  constexpr int PTX_8_5 = 12050;  // CUDA 12.5, R555: PTX ISA, "Release Notes"
  return "the CUDA driver is of version " + version_text(version) + ", and " + version_text(PTX_8_5) +
         " or newer is needed";
}

BoundContext::BoundContext(int device) {
  const Driver& api = driver();
  CUcontext current = nullptr;
  check(api.cuCtxGetCurrent(&current), "cuCtxGetCurrent");
  if (current) {
    CUdevice handle = -1;
    check(api.cuCtxGetDevice(&handle), "cuCtxGetDevice");
    if (handle == device) return;
  }
  check(api.cuCtxSetCurrent(primary_context(device)), "cuCtxSetCurrent");
  before_ = current;
}

BoundContext::~BoundContext() {
  if (before_) driver().cuCtxSetCurrent(before_);
}

RelaxedCapture::RelaxedCapture() {
  check(driver().cuThreadExchangeStreamCaptureMode(&before_), "cuThreadExchangeStreamCaptureMode");
}

RelaxedCapture::~RelaxedCapture() { driver().cuThreadExchangeStreamCaptureMode(&before_); }

}  // namespace sparse24::cuda
