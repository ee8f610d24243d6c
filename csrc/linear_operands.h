// The operands of linear, linear_inference and linear_fused, checked alike for the CPU and the device.
#pragma once
#include <optional>
#include <vector>

#include "csrc/arguments.h"
#include "kernels/linear.cuh"

namespace sparse24 {

// The element type of a weight that is multiplied: by its name, by its values.
Element linear_element(const std::string& dtype);
Element values_element(const Tensor& values);
Element device_element(Element element);  // the same, of a weight that is multiplied on a device
bool is_float(ScalarType type);

// What `packed` must be; returns its data. `alignment` in bytes.
const uint8_t* packed_data(const Tensor& packed, int64_t bytes, int alignment, const std::string& dtype,
                           int64_t out_features, int64_t in_features);

// Whether all leading dimensions of x step by one row stride, which is written to `stride`.
bool rows_are_regular(const Tensor& x, int64_t& stride);

// What linear_fused takes beyond linear, where y is of the type of x.
struct FusedOperands {
  std::optional<Tensor> x_scales, residual, y_scale;
  std::string out_dtype;
};

// Every tensor is ready for a kernel: vectors contiguous, rows of x and residual at a regular stride.
struct LinearOperands {
  Tensor x;
  std::optional<Tensor> bias, scales, x_scales, residual, y_scale;
  Element element;  // of W
  Activation activation;
  ScalarType y_type;
  std::vector<int64_t> y_shape;
  int64_t x_stride, residual_stride = 0;  // elements
  int64_t tokens, out_features, in_features;

  // Throws naming the first operand that does not fit. `fused` null: linear.
  LinearOperands(const Tensor& x, std::optional<Tensor> bias, std::optional<Tensor> scales, int64_t out_features,
                 int64_t in_features, const std::string& dtype, const std::string& activation,
                 FusedOperands* fused = nullptr);
};

}  // namespace sparse24
