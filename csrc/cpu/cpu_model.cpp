// Asks cpuid for the vendor and the model; on other machines the system's name is the model.
#include "csrc/cpu/cpu_model.h"

#include <sys/utsname.h>

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace sparse24::cpu {
namespace {

struct Model {
  std::string vendor, name;
};

Model detect() {
  Model model;
#if defined(__x86_64__)
  uint32_t words[12] = {}, highest = 0;
  __get_cpuid(0, &highest, &words[0], &words[2], &words[1]);
  model.vendor.assign(reinterpret_cast<const char*>(words), 12);
  bool named = true;
  for (uint32_t i = 0; i < 3; ++i) {
    uint32_t* const four = words + 4 * i;
    named = named && __get_cpuid(0x80000002 + i, &four[0], &four[1], &four[2], &four[3]) != 0;
  }
  if (named) model.name.assign(reinterpret_cast<const char*>(words), strnlen(reinterpret_cast<char*>(words), 48));
#endif
  const size_t first = model.name.find_first_not_of(' '), last = model.name.find_last_not_of(' ');
  model.name = first == std::string::npos ? "" : model.name.substr(first, last - first + 1);
  if (model.name.empty()) {
    utsname system{};
    model.name = uname(&system) == 0 ? system.machine : "unknown";
  }
  return model;
}

const Model& this_model() {
  static const Model model = detect();
  return model;
}

}  // namespace

Cpu this_cpu() {
  const Model& model = this_model();
  static const Vendor vendor = model.vendor == "AuthenticAMD"   ? Vendor::AMD
                               : model.vendor == "GenuineIntel" ? Vendor::INTEL
                                                                : Vendor::OTHER;
  return {vendor, active_isa()};
}

const std::string& cpu_name() { return this_model().name; }

}  // namespace sparse24::cpu
