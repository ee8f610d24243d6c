// The operands of linear and conv2d, checked alike for the CPU and the device.
#pragma once
#include <optional>
#include <vector>

#include "csrc/arguments.h"
#include "kernels/linear.cuh"

namespace sparse24 {

// The element type of a weight that is multiplied, by its name: a dtype, int4 being in pair 4:8; or "int4-2:4".
Element linear_element(const std::string& dtype);
Element device_element(Element element);  // the same, of a weight that is multiplied on a device
bool is_float(ScalarType type);
bool is_integer(Element element);

// Refuses a number of columns that cannot share scales in a weight of this type; 0 is none.
void check_group_size(int64_t group_size, Element element);

// What `packed` must be; returns its data. `alignment` in bytes.
const uint8_t* packed_data(const Tensor& packed, int64_t bytes, int alignment, const std::string& dtype,
                           int64_t out_features, int64_t in_features);

// Whether all leading dimensions of x step by one row stride, which is written to `stride`.
bool rows_are_regular(const Tensor& x, int64_t& stride);

// What linear_fused and conv2d take beyond linear, where y is of the type of x.
struct FusedOperands {
  std::optional<Tensor> x_scales, residual, y_scale;
  std::string out_dtype;
};

// W and what becomes of its products with x: every tensor is ready for a kernel.
struct ProductOperands {
  std::optional<Tensor> bias, scales, x_scales, residual, y_scale;
  Element element;  // of W
  bool weight_only;
  int64_t group_size;  // columns of W that share scales, then [groups, out_features]; 0: all of them
  Activation activation;
  ScalarType x_type, y_type;
  int64_t tokens = 0, out_features, in_features;
  int64_t residual_stride = 0;  // elements

  // For a y of y_type whose rows lie out_features apart.
  Epilogue epilogue(const Tensor& y) const;

 protected:
  // Throws naming the first operand that does not fit, as do the others. `fused` null: y is of the type of x.
  ProductOperands(ScalarType x_type, std::optional<Tensor> bias, std::optional<Tensor> scales, int64_t out_features,
                  int64_t in_features, const std::string& dtype, const std::string& activation, bool weight_only,
                  int64_t group_size, const FusedOperands* fused);
  // An int8 x has one x_scale, or `scale_count`: "one a token".
  void take(FusedOperands& fused, const std::vector<int64_t>& y_shape, int64_t scale_count, const char* each);
};

// x of any shape [..., in_features]; rows of x and residual at a regular stride.
struct LinearOperands : ProductOperands {
  Tensor x;
  std::vector<int64_t> y_shape;
  int64_t x_stride;  // elements

  LinearOperands(const Tensor& x, std::optional<Tensor> bias, std::optional<Tensor> scales, int64_t out_features,
                 int64_t in_features, const std::string& dtype, const std::string& activation, bool weight_only,
                 int64_t group_size, FusedOperands* fused = nullptr);
};

// A convolution's geometry, one number for the height and one for the width.
struct ConvGeometry {
  int64_t out_channels, in_channels;
  std::vector<int64_t> kernel_size, stride, padding, dilation;
  int64_t groups;

  void check() const;
  int64_t out_extent(int64_t extent, int dim) const;  // of y, in height (0) or width (1)
};

// x [images, in_channels, height, width] with unit stride over channels or columns; residual channels last, no gaps.
struct ConvOperands : ProductOperands {
  Tensor x;
  bool channels_last;  // how y is to lie
  std::vector<int64_t> y_shape;

  ConvOperands(const Tensor& x, std::optional<Tensor> bias, std::optional<Tensor> scales, const ConvGeometry& geometry,
               const std::string& dtype, const std::string& activation, bool weight_only, FusedOperands& fused);
};

}  // namespace sparse24
