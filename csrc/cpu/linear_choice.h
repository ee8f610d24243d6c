// Which kernels run a product of a given shape on this machine.
#pragma once
#include "csrc/cpu/linear_kernels.h"

namespace sparse24::cpu {

const Kernels& kernels_for(Element weight, bool weight_only, Element x_element, int64_t tokens, int64_t out_features,
                           int64_t in_features);

}  // namespace sparse24::cpu
