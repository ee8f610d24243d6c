// Runs a launch as a driver would: checks its limits first, and lets the calling thread stop it.
#pragma once
#include <stdexcept>

#include "csrc/ptx/api.h"
#include "csrc/ptx/loaded_module.h"
#include "csrc/ptx/machine.h"

namespace sparse24::ptx {

class Interrupted : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Throws std::invalid_argument for what the driver refuses, Interrupted when launch.interrupted says so.
LaunchResult run(LoadedModule& module, const Program& program, const sparse24_ptx_launch& launch);

}  // namespace sparse24::ptx
