// Whether a device's kernels give the right sums: what no test without that device can tell.
#pragma once
#include <string>

#include "kernels/format.cuh"

namespace sparse24::cuda {

// Empty where the kernels for this element type (F16, BF16, I8) may be used on CUDA device `device`; else why not:
// there is no driver, it is too old, it has refused a call, or a kernel gave a wrong number.
//
// Before first use on a device every kernel multiplies small integers, whose sums are exact, on a stream of its own;
// the outcome is kept, unless it is that memory is short. That is put off while `stream`, where the caller is to
// launch, captures a graph: what has not been tried is then taken to be good. The string lives until the thread asks
// again.
const std::string& device_problem(int device, void* stream, Element element);

}  // namespace sparse24::cuda
