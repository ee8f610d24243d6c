// The emulator as a machine: the launches of this library, run on the CPU by libsparse24ptx.so from the PTX that every
// cubin is assembled from.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "csrc/cuda/launch.h"
#include "csrc/ptx/api.h"

namespace sparse24::cuda {

// A PTX text, read; each of its kernels is decoded once, when it is first run.
using Ptx = std::shared_ptr<sparse24_ptx_module>;
// Throws std::runtime_error with `name`, the place in the text and what is wrong there.
Ptx load_ptx(std::string_view name, std::string_view text);

// An architecture, as far as launches depend on it.
struct EmulatedArch {
  const char* name;  // "sm_80"
  Device device;
  uint32_t numerics;  // of its tensor cores, as in csrc/ptx/api.h
};
// Null where there is none of that name.
const EmulatedArch* find_arch(std::string_view name);
std::string arch_names();  // "sm_80, sm_86, ..."

struct EmulatorOptions {
  std::string arch;
  Device device;
  // As in csrc/ptx/api.h.
  uint32_t checks = 63, counters = 0, numerics = 0, order = 0, threads = 0;
  uint64_t seed = 0;
  std::map<std::string, Ptx, std::less<>> modules;  // run in the place of the shipped module of that name
  int (*interrupted)(void*) = nullptr;              // as in csrc/ptx/api.h
  void* context = nullptr;                          // its argument
};

// Runs a launch at once, on host memory. A range begins at an address that is no more aligned than the host's own, and
// than 16 bytes; one that the launch is to write is filled with ones (NaN, -1) before, so that an entry that it leaves
// out shows. Two ranges over the same bytes have one address.
class EmulatedMachine : public Machine {
 public:
  // Both stay the caller's. Each launch adds its report to `reports`: a JSON object with the kernel's name, and what
  // sparse24_ptx_report_json says.
  EmulatedMachine(const EmulatorOptions& options, std::vector<std::string>& reports)
      : options_(options), reports_(reports) {}

  Device device() const override { return options_.device; }
  // Throws std::runtime_error for a launch that a driver would refuse, and for findings, naming the first.
  void run(const Launch& launch) const override;

 private:
  const EmulatorOptions& options_;
  std::vector<std::string>& reports_;
};

}  // namespace sparse24::cuda
