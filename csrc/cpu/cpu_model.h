// Which CPU this is, as far as the choice of kernels depends on it.
#pragma once
#include <string>

#include "csrc/cpu/isa.h"

namespace sparse24::cpu {

enum class Vendor { AMD, INTEL, OTHER };

struct Cpu {
  Vendor vendor;
  Isa isa;  // the best that the kernels may use
};

Cpu this_cpu();                 // with the active ISA
const std::string& cpu_name();  // the model's name, such as "AMD EPYC 9354 32-Core Processor"

}  // namespace sparse24::cpu
