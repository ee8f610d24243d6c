// The operators on a device, as far as csrc/ops.cpp calls them: for CPU tensors in a thread that emulates. Those for
// CUDA tensors are registered in csrc/ops_device.cpp.
#pragma once
#include "csrc/emulation.h"
#include "csrc/operands.h"

namespace sparse24::ops {

// Where this is false, nothing below exists, nor does current_emulation().
constexpr bool HAS_DEVICE_CODE = sizeof SPARSE24_ARCHS > 1;

// `packed` is the CPU's form of the weight; the device's is packed from it, by the device's kernel.
Tensor emulated_linear(const Emulation& emulation, LinearOperands in, const uint8_t* packed);
Tensor emulated_decompress(const Emulation& emulation, const Tensor& values, const Tensor& meta, int64_t in_features,
                           const std::string& dtype, const std::string& pattern);

// What linear would launch for x, a CUDA tensor or one of an emulating thread: "linear_f16_64x64, K in 3 splits".
std::string linear_plan(const Tensor& x, int64_t out_features, Element element);

// Empty where CUDA device `device` runs the kernels for this element type, else the reason why it does not.
std::string device_problem(int64_t device, Element element);

}  // namespace sparse24::ops
