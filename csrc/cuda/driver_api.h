// What is used of the CUDA driver: its entry points, found in libcuda.so.1 on first use, its errors and its contexts.
#pragma once
#include <cuda.h>

#include <stdexcept>
#include <string>

namespace sparse24::cuda {

// clang-format off
#define SPARSE24_DRIVER_CALLS(CALL)                                                                             \
  CALL(cuInit) CALL(cuGetErrorString) CALL(cuDeviceGet) CALL(cuDeviceGetAttribute) CALL(cuCtxGetCurrent)        \
  CALL(cuCtxSetCurrent) CALL(cuCtxGetDevice) CALL(cuDevicePrimaryCtxRetain) CALL(cuLibraryLoadData)             \
  CALL(cuLibraryUnload) CALL(cuLibraryGetKernel) CALL(cuKernelGetFunction) CALL(cuKernelSetAttribute)           \
  CALL(cuLaunchKernelEx) CALL(cuThreadExchangeStreamCaptureMode) CALL(cuStreamIsCapturing) CALL(cuStreamCreate) \
  CALL(cuStreamDestroy) CALL(cuStreamSynchronize) CALL(cuMemAlloc) CALL(cuMemFree) CALL(cuMemsetD8Async)        \
  CALL(cuMemcpyHtoDAsync) CALL(cuMemcpyDtoHAsync)
// clang-format on

// Each entry point under its own name: driver().cuInit(0).
struct Driver {
#define SPARSE24_ENTRY(NAME) decltype(&::NAME) NAME;
  SPARSE24_DRIVER_CALLS(SPARSE24_ENTRY)
#undef SPARSE24_ENTRY
  int version;  // of CUDA that the driver serves: 13000 is 13.0
};

// Throws std::runtime_error where there is no driver, or one without these entry points; each time, as long as it is
// so.
const Driver& driver();

// What the driver has refused.
struct DriverError : std::runtime_error {
  DriverError(CUresult code, const std::string& text) : std::runtime_error(text), code(code) {}
  CUresult code;
};
// Throws DriverError with the driver's words unless `result` is success. `call` is what was called, `of` for what.
void check(CUresult result, const char* call, const char* of = nullptr);

// The end of a message: which driver this is, and which is needed.
std::string version_needed(int version);

// While it lives, the thread's context is of `device`: its primary one, unless the thread has one of it already.
//
// A launch runs in the calling thread's context. Autograd's worker threads start without one, or with another device's
// (pytorch/pytorch#124565). Where there was none, the device's stays.
class BoundContext {
 public:
  explicit BoundContext(int device);
  ~BoundContext();
  BoundContext(const BoundContext&) = delete;

 private:
  CUcontext before_ = nullptr;
};

// While it lives, the thread may load, allocate and wait although a stream of this or another thread is capturing.
class RelaxedCapture {
 public:
  RelaxedCapture();
  ~RelaxedCapture();
  RelaxedCapture(const RelaxedCapture&) = delete;

 private:
  CUstreamCaptureMode before_ = CU_STREAM_CAPTURE_MODE_RELAXED;
};

}  // namespace sparse24::cuda
