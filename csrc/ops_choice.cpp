// The operators that tell and steer which CPU kernels run (sparse24/ops.py, sparse24/tuning.py).
#include <torch/csrc/stable/library.h>

#include "csrc/cpu/cpu_model.h"
#include "csrc/cpu/isa.h"
#include "csrc/cpu/linear/linear_choice.h"
#include "csrc/operands.h"

namespace sparse24::ops {
namespace {

std::string cpu_name() { return cpu::cpu_name(); }

// By blanks, "dense" last.
std::string cpu_kernels(std::string dtype, bool weight_only, std::string x_dtype) {
  std::string names;
  for (const char* name : cpu::kernels_of(linear_element(dtype), weight_only, element_of(x_dtype))) {
    names += std::string(name) + " ";
  }
  return names + "dense";
}

std::tuple<std::string, std::string> cpu_choice(std::string dtype, bool weight_only, std::string x_dtype,
                                                int64_t tokens, int64_t out_features, int64_t in_features) {
  const cpu::Choice choice =
      cpu::choose(linear_element(dtype), weight_only, element_of(x_dtype), tokens, out_features, in_features);
  return {choice.kernels, choice.reason};
}

void force_cpu_kernels(std::string kernels) {
  REQUIRE(cpu::force_kernels(kernels), "kernels must be 'perm', 'gather', 'amx', 'portable', 'dense' or ''; got '",
          kernels, "'");
}

// A line each: dtype, weight_only, x dtype, tokens, out_features, in_features, ISA, threads, kernels, reason.
void set_tuned_kernels(std::string table) {
  std::vector<cpu::Tuned> tuned;
  std::istringstream lines(table);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string dtype, x_dtype, isa;
    cpu::Tuned one{};
    words >> dtype >> one.product.weight_only >> x_dtype >> one.product.tokens >> one.product.out_features >>
        one.product.in_features >> isa >> one.threads >> one.kernels >> std::ws;
    REQUIRE(static_cast<bool>(words), "table must have ten words or more in each line; got '", line, "'");
    std::getline(words, one.reason);
    one.product.weight = linear_element(dtype), one.product.x_element = element_of(x_dtype);
    for (int i = 0; i <= static_cast<int>(cpu::best_isa()); ++i) {  // what this machine cannot run is left out
      one.isa = static_cast<cpu::Isa>(i);
      if (isa == cpu::name_of(one.isa)) tuned.push_back(one);
    }
  }
  cpu::set_tuned(std::move(tuned));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparse24, CompositeExplicitAutograd, m) {
  m.impl("cpu_name", TORCH_BOX(&cpu_name));
  m.impl("cpu_kernels", TORCH_BOX(&cpu_kernels));
  m.impl("cpu_choice", TORCH_BOX(&cpu_choice));
  m.impl("force_cpu_kernels", TORCH_BOX(&force_cpu_kernels));
  m.impl("set_tuned_kernels", TORCH_BOX(&set_tuned_kernels));
}

}  // namespace sparse24::ops
