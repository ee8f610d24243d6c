// `with sparse24.emulate(...)`: whether the operators of this thread, on CPU tensors, run the device's kernels on the
// emulator instead of the CPU's own.
#pragma once
#include <string>
#include <vector>

#include "csrc/cuda/emulator.h"

namespace sparse24 {

struct Emulation {
  cuda::EmulatorOptions options;
  std::string linear_kernel;  // asked for by name; empty: as the plan has it
  int splits = 0;             // of K, asked for; 0: as the plan has it
  mutable std::vector<std::string> reports;
  bool interrupted = false;  // Ctrl-C has stopped a launch, or is to stop the next

  cuda::EmulatedMachine machine() const { return {options, reports}; }
};

// The innermost of the calling thread; null where it does not emulate.
const Emulation* current_emulation();

}  // namespace sparse24
