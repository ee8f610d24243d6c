// Which kernels run a product on which CPU: what a caller forces, else what was measured on this machine, else a table
// of rules that ships. By the shape, the element types and the CPU alone, so that a product always runs the same way.
#pragma once
#include <string>
#include <vector>

#include "csrc/cpu/cpu_model.h"
#include "csrc/cpu/linear/linear.h"

namespace sparse24::cpu {

struct Kernels;  // linear_kernels.h

struct LinearProduct {
  Element weight;
  bool weight_only;
  Element x_element;
  int64_t tokens, out_features, in_features;
};

Choice choose(const LinearProduct& product);  // choose() of linear.h

// The same by the rules alone, for any CPU.
Choice choose_by_rules(const Cpu& cpu, const LinearProduct& product);

// The kernels of linear(): those chosen, and where that is "dense", which linear() is not, the best sparse ones.
const Kernels& kernels_for(Element weight, bool weight_only, Element x_element, int64_t tokens, int64_t out_features,
                           int64_t in_features);

// Kernels whose pack() makes a panel of one row out of a row of x, in `panel_element`: what a dense product is given.
const Kernels& packing_kernels(Element weight, bool weight_only, Element x_element, Element panel_element);

// The names of all kernels that the active ISA has for such a product, best first. "dense" is not among them.
std::vector<const char*> kernels_of(Element weight, bool weight_only, Element x_element);

// From here on the calling thread's products run these kernels, or "dense"; "" ends it. False if nothing has that name.
// A product that they cannot run throws std::runtime_error.
bool force_kernels(const std::string& name);

// What was measured to be fastest for one product.
struct Tuned {
  LinearProduct product;
  Isa isa;
  int threads;
  std::string kernels;
  std::string reason;
};

// Replaces all that was measured. A product whose tokens lie between two measured ones of one winner takes it as well.
// Entries that name no kernels of the product are ignored. Any number of threads may choose meanwhile.
void set_tuned(std::vector<Tuned> tuned);

}  // namespace sparse24::cpu
