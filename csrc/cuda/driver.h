// The CUDA driver as a machine. It is found in libcuda.so.1 on first use: the library loads without one.
#pragma once
#include "csrc/cuda/launch.h"

namespace sparse24::cuda {

// Launches are queued on `stream` of CUDA device `device`, whatever context the thread has; it keeps the one it has.
class DriverMachine : public Machine {
 public:
  // Throws std::runtime_error where there is no driver, one that is too old, or no such device.
  DriverMachine(int device, void* stream);

  void* stream() const { return stream_; }
  Device device() const override;
  void run(const Launch& launch) const override;

 private:
  int device_;
  void* stream_;
};

}  // namespace sparse24::cuda
