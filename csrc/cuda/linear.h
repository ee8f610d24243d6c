// The kernels of the linear product: which of them runs a shape, and its launches. No torch.
#pragma once
#include <optional>
#include <span>
#include <string>

#include "csrc/cuda/launch.h"
#include "kernels/format.cuh"
#include "kernels/linear.cuh"

namespace sparse24::cuda {

// y = activation(x W^T + bias + residual) on device memory; Epilogue and LinearArguments say what each means.
struct Linear {
  Element element;  // of W and x: F16, BF16 or I8
  const void* x;
  int64_t x_stride;  // elements between rows of x, any value (also 0, or negative)
  const uint8_t* packed;
  int64_t in_features;
  Epilogue epilogue;
};

// How a product runs: chosen by a fixed table from the shape, the alignment and the device alone.
struct Plan {
  const char* kernel;  // "linear_f16_128x128", "linear_few_f16"
  int splits;          // of K; more than 1: a workspace, and a second launch that adds them up in order
  int64_t workspace_bytes;
};
Plan plan_linear(const Linear& call, const Device& device);
// The kernels that may be asked for by name, for tests and measurements; nullptr in `kernel` where one cannot run the
// call (its alignment, its shared memory, more tokens than it takes).
std::span<const char* const> linear_kernels(Element element);
std::optional<Plan> plan_linear_as(const Linear& call, const Device& device, const std::string& kernel, int splits);

// One launch, or two with splits. `workspace` is 16-byte aligned device memory of plan.workspace_bytes.
void run_linear(const Machine& machine, const Linear& call, const Plan& plan, void* workspace);

// The launches of the other kernels. Arrays are contiguous; sizes at least 1.
Launch describe_decompress(const void* values, const uint8_t* meta, void* dense, int64_t rows, int64_t in_features,
                           Element element, Pattern pattern);
int64_t packed_bytes(Element element, int64_t out_features, int64_t in_features);
Launch describe_pack(const void* values, const uint8_t* meta, Element element, int64_t out_features,
                     int64_t in_features, uint8_t* packed);
Launch describe_unpack(const uint8_t* packed, Element element, int64_t out_features, int64_t in_features, void* values,
                       uint8_t* meta);
// q [tokens, q_stride] int8 and scales [tokens] of a float x; x_stride in elements.
Launch describe_quantize(const void* x, int64_t x_stride, Element x_element, int64_t tokens, int64_t in_features,
                         int8_t* q, int64_t q_stride, float* scales);

}  // namespace sparse24::cuda
