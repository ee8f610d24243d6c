// The rules for the operands of linear, each with its error.
#include "csrc/linear_operands.h"

namespace sparse24 {

namespace {

Activation activation_of(const std::string& activation) {
  if (activation == "none") return Activation::NONE;
  if (activation == "relu") return Activation::RELU;
  if (activation == "gelu") return Activation::GELU;
  if (activation == "gelu_tanh") return Activation::GELU_TANH;
  REQUIRE(activation == "silu", "activation must be 'none', 'relu', 'gelu', 'gelu_tanh' or 'silu'; got '", activation,
          "'");
  return Activation::SILU;
}

ScalarType y_type_of(const std::string& out_dtype) {
  for (const ScalarType type :
       {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16, ScalarType::Char, ScalarType::Int}) {
    if (out_dtype == name_of(type)) return type;
  }
  refuse("out_dtype must be float32, float16, bfloat16, int8 or int32; got ", out_dtype);
}

void make_contiguous(std::optional<Tensor>& tensor) {
  if (!tensor->is_contiguous()) tensor = torch::stable::contiguous(*tensor);
}

// float32, of no dimension or of one entry.
bool is_one_scale(const Tensor& scale) {
  return scale.scalar_type() == ScalarType::Float && scale.dim() <= 1 && scale.numel() == 1;
}

void take_fused(LinearOperands& in, FusedOperands& fused) {
  const bool int8_x = in.x.scalar_type() == ScalarType::Char;
  const bool plain_sums = in.y_type == ScalarType::Int;
  REQUIRE(!int8_x || in.element == Element::I8, "x must be of a float dtype for a float weight; got int8");
  if (plain_sums) {
    REQUIRE(int8_x, "out_dtype int32, the plain sums, needs an int8 x; got ", name_of(in.x.scalar_type()));
    for (const auto& [name, given] : {std::pair{"bias", in.bias.has_value()},
                                      {"scales", in.scales.has_value()},
                                      {"x_scales", fused.x_scales.has_value()},
                                      {"residual", fused.residual.has_value()},
                                      {"activation", in.activation != Activation::NONE}}) {
      REQUIRE(!given, "out_dtype int32 gives the plain sums: ", name, " must be none; got one");
    }
  }

  if (fused.x_scales) {
    REQUIRE(int8_x, "x_scales are for an int8 x alone; got some for ", name_of(in.x.scalar_type()));
    const Tensor& scales = *fused.x_scales;
    const bool each = scales.scalar_type() == ScalarType::Float && scales.dim() == 1 && scales.size(0) == in.tokens;
    REQUIRE(each || is_one_scale(scales), "x_scales must be float32 [], [1] or [", in.tokens, "], one a token; got ",
            name_of(scales.scalar_type()), " ", shape_of(scales));
    in.x_scales = std::move(fused.x_scales);
    make_contiguous(in.x_scales);
  } else {
    REQUIRE(!int8_x || plain_sums, "x_scales are required for an int8 x; got none");
  }

  if (fused.residual) {
    const Tensor& residual = *fused.residual;
    REQUIRE(is_float(residual.scalar_type()), "residual must be float32, float16 or bfloat16; got ",
            name_of(residual.scalar_type()));
    bool fits = residual.dim() == static_cast<int64_t>(in.y_shape.size());
    for (int64_t i = 0; fits && i < residual.dim(); ++i) fits = residual.size(i) == in.y_shape[i];
    REQUIRE(fits, "residual must be of the shape of y, ", shape_of(in.y_shape), "; got ", shape_of(residual));
    in.residual = std::move(fused.residual);
    if (!rows_are_regular(*in.residual, in.residual_stride)) {
      in.residual = torch::stable::contiguous(*in.residual);
      in.residual_stride = in.out_features;
    }
  }

  REQUIRE(fused.y_scale.has_value() == (in.y_type == ScalarType::Char),
          fused.y_scale ? "y_scale is for out_dtype int8 alone; got one for another"
                        : "y_scale is required for out_dtype int8; got none");
  if (fused.y_scale) {
    REQUIRE(is_one_scale(*fused.y_scale), "y_scale must be float32 [] or [1]; got ",
            name_of(fused.y_scale->scalar_type()), " ", shape_of(*fused.y_scale));
    in.y_scale = std::move(fused.y_scale);
  }
}

}  // namespace

Element linear_element(const std::string& dtype) {
  const Element element = element_of(dtype);
  REQUIRE(element != Element::I4, "dtype must be float32, float16, bfloat16 or int8; no kernel multiplies int4 yet");
  return element;
}

Element values_element(const Tensor& values) {
  const Element element = element_of("values", values.scalar_type());
  REQUIRE(element != Element::I4, "values must be float32, float16, bfloat16 or int8; no kernel multiplies int4 yet");
  return element;
}

Element device_element(Element element) {
  REQUIRE(element != Element::F32,
          "dtype must be float16, bfloat16 or int8 on a GPU: none of its kernels multiplies "
          "float32; got float32");
  return element;
}

bool is_float(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
}

const uint8_t* packed_data(const Tensor& packed, int64_t bytes, int alignment, const std::string& dtype,
                           int64_t out_features, int64_t in_features) {
  REQUIRE(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.size(0) == bytes &&
              packed.is_contiguous(),
          "packed must be contiguous uint8 [", bytes, "] for a [", out_features, ", ", in_features, "] ", dtype,
          " weight; got ", name_of(packed.scalar_type()), " ", shape_of(packed));
  const auto data = static_cast<const uint8_t*>(packed.const_data_ptr());
  REQUIRE(reinterpret_cast<uintptr_t>(data) % alignment == 0 || bytes == 0, "packed must start at a multiple of ",
          alignment, " bytes, as pack() makes it; got an address ", reinterpret_cast<uintptr_t>(data) % alignment,
          " bytes past one");
  return data;
}

bool rows_are_regular(const Tensor& x, int64_t& stride) {
  const int64_t dims = x.dim();
  if (x.size(dims - 1) > 1 && x.stride(dims - 1) != 1) return false;
  stride = x.size(dims - 1);
  bool found = false;
  int64_t next = 0;  // what the next outer dimension must step by
  for (int64_t i = dims - 2; i >= 0; --i) {
    if (x.size(i) == 1) continue;
    if (!found)
      stride = x.stride(i), found = true;
    else if (x.stride(i) != next)
      return false;
    next = x.stride(i) * x.size(i);
  }
  return true;
}

LinearOperands::LinearOperands(const Tensor& x_in, std::optional<Tensor> bias_in, std::optional<Tensor> scales_in,
                               int64_t out_features_in, int64_t in_features_in, const std::string& dtype,
                               const std::string& activation_in, FusedOperands* fused)
    : x(x_in),
      bias(std::move(bias_in)),
      scales(std::move(scales_in)),
      element(linear_element(dtype)),
      activation(activation_of(activation_in)),
      y_type(x_in.scalar_type()),
      out_features(out_features_in),
      in_features(in_features_in) {
  const int64_t dims = x.dim();
  const bool int8_x = fused && x.scalar_type() == ScalarType::Char;
  REQUIRE(int8_x || is_float(x.scalar_type()), "x must be float32, float16",
          fused ? ", bfloat16 or int8" : " or bfloat16", "; got ", name_of(x.scalar_type()));
  REQUIRE(dims >= 1 && x.size(dims - 1) == in_features, "x must be [..., ", in_features, "] to match weight [",
          out_features, ", ", in_features, "]; got ", shape_of(x));
  if (fused) y_type = y_type_of(fused->out_dtype);
  REQUIRE(out_features >= 0, "out_features must not be negative; got ", out_features);

  // Beyond, an int32 sum of q * w with q in [-127, 127], or of an int8 x that holds -128, could wrap.
  const int64_t exact_features = (int64_t{1} << 18) - (int8_x ? 4 : 0);
  REQUIRE(element != Element::I8 || in_features <= exact_features, "in_features must be at most ", exact_features,
          " for an int8 weight", int8_x ? " and an int8 x" : "", "; got ", in_features);

  if (bias) {
    REQUIRE(is_float(bias->scalar_type()), "bias must be float32, float16 or bfloat16; got ",
            name_of(bias->scalar_type()));
    REQUIRE(bias->dim() == 1 && bias->size(0) == out_features, "bias must be [", out_features, "]; got ",
            shape_of(*bias));
    make_contiguous(bias);
  }
  REQUIRE(scales.has_value() == (element == Element::I8) || (y_type == ScalarType::Int && !scales),
          element == Element::I8 ? "scales are required for an int8 weight; got none"
                                 : "scales are for int8 weights alone; got some for another");
  if (scales) {
    REQUIRE(scales->scalar_type() == ScalarType::Float && scales->dim() == 1 && scales->size(0) == out_features,
            "scales must be float32 [", out_features, "]; got ", name_of(scales->scalar_type()), " ",
            shape_of(*scales));
    make_contiguous(scales);
  }

  y_shape.assign(x.sizes().begin(), x.sizes().end());
  y_shape.back() = out_features;
  tokens = 1;
  for (int64_t i = 0; i < dims - 1; ++i) tokens *= y_shape[i];
  if (!rows_are_regular(x, x_stride)) {
    x = torch::stable::contiguous(x);
    x_stride = in_features;
  }
  if (fused) take_fused(*this, *fused);
}

}  // namespace sparse24
