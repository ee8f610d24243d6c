// The rules for the operands of linear, each with its error.
#include "csrc/operands.h"

#include "csrc/cpu/linear/linear.h"

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

Number number_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Number::F32;
    case ScalarType::Half:
      return Number::F16;
    case ScalarType::BFloat16:
      return Number::BF16;
    case ScalarType::Char:
      return Number::I8;
    default:
      return Number::I32;
  }
}

const float* floats_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

}  // namespace

Element linear_element(const std::string& dtype) {
  return dtype == "int4-2:4" ? Element::I4_TWO_FOUR : element_of(dtype);
}

Element device_element(Element element) {
  REQUIRE(element != Element::F32 && !is_int4(element),
          "dtype must be float16, bfloat16 or int8 on a GPU: none of its kernels multiplies ",
          element == Element::F32 ? "float32; got float32" : "int4; got int4");
  return element;
}

bool is_float(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
}

bool is_integer(Element element) { return element == Element::I8 || is_int4(element); }

void check_group_size(int64_t group_size, Element element) {
  REQUIRE(group_size >= 0 && group_size % cpu::GROUP_QUANTUM == 0, "group_size must be a positive multiple of ",
          cpu::GROUP_QUANTUM, ", or None; got ", group_size);
  REQUIRE(group_size == 0 || is_integer(element), "group_size is for an int8 or int4 weight; got ", group_size,
          " for another");
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

ProductOperands::ProductOperands(ScalarType x_type_in, std::optional<Tensor> bias_in, std::optional<Tensor> scales_in,
                                 int64_t out_features_in, int64_t in_features_in, const std::string& dtype,
                                 const std::string& activation_in, bool weight_only_in, int64_t group_size_in,
                                 const FusedOperands* fused)
    : bias(std::move(bias_in)),
      scales(std::move(scales_in)),
      element(linear_element(dtype)),
      weight_only(weight_only_in),
      group_size(group_size_in),
      activation(activation_of(activation_in)),
      x_type(x_type_in),
      y_type(x_type_in),
      out_features(out_features_in),
      in_features(in_features_in) {
  const bool int8_x = fused && x_type == ScalarType::Char, integer = is_integer(element);
  REQUIRE(int8_x || is_float(x_type), "x must be float32, float16", fused ? ", bfloat16 or int8" : " or bfloat16",
          "; got ", name_of(x_type));
  if (fused) y_type = y_type_of(fused->out_dtype);
  REQUIRE(!weight_only || integer, "weight_only is for an int8 or int4 weight; got it for ", dtype);
  REQUIRE(weight_only || element != Element::I4_TWO_FOUR,
          "weight_only must be true for an int4 weight in 2:4: where x is rounded, kernels keep pairs of columns; got "
          "false");
  check_group_size(group_size, element);
  REQUIRE(!weight_only || !int8_x, "x must be of a float dtype with weight_only; got int8");
  REQUIRE(out_features >= 0, "out_features must not be negative; got ", out_features);

  // Beyond, an int32 sum of q * w with q in [-127, 127], or of an int8 x that holds -128, could wrap.
  const int64_t exact_features = (int64_t{1} << 18) - (int8_x ? 4 : 0);
  REQUIRE(!integer || weight_only || in_features <= exact_features, "in_features must be at most ", exact_features,
          " for an ", dtype, " weight", int8_x ? " and an int8 x" : "", "; got ", in_features);

  if (bias) {
    REQUIRE(is_float(bias->scalar_type()), "bias must be float32, float16 or bfloat16; got ",
            name_of(bias->scalar_type()));
    REQUIRE(bias->dim() == 1 && bias->size(0) == out_features, "bias must be [", out_features, "]; got ",
            shape_of(*bias));
    make_contiguous(bias);
  }
  REQUIRE(scales.has_value() == integer || (y_type == ScalarType::Int && !scales),
          integer ? "scales are required for an " + dtype + " weight; got none"
                  : "scales are for int8 and int4 weights alone; got some for another");
  if (scales) {
    std::vector<int64_t> shape{out_features};
    if (group_size) shape.insert(shape.begin(), cpu::scale_groups(in_features, group_size));
    REQUIRE(scales->scalar_type() == ScalarType::Float && std::ranges::equal(scales->sizes(), shape),
            "scales must be float32 ", shape_of(shape), "; got ", name_of(scales->scalar_type()), " ",
            shape_of(*scales));
    make_contiguous(scales);
  }
}

void ProductOperands::take(FusedOperands& fused, const std::vector<int64_t>& y_shape, int64_t scale_count,
                           const char* each) {
  const bool int8_x = x_type == ScalarType::Char, plain_sums = y_type == ScalarType::Int;
  REQUIRE(!int8_x || is_integer(element), "x must be of a float dtype for a float weight; got int8");
  if (plain_sums) {
    REQUIRE(int8_x, "out_dtype int32, the plain sums, needs an int8 x; got ", name_of(x_type));
    for (const auto& [name, given] : {std::pair{"bias", bias.has_value()},
                                      {"group_size", group_size != 0},
                                      {"scales", scales.has_value()},
                                      {"x_scales", fused.x_scales.has_value()},
                                      {"residual", fused.residual.has_value()},
                                      {"activation", activation != Activation::NONE}}) {
      REQUIRE(!given, "out_dtype int32 gives the plain sums: ", name, " must be none; got one");
    }
  }

  if (fused.x_scales) {
    REQUIRE(int8_x, "x_scales are for an int8 x alone; got some for ", name_of(x_type));
    const Tensor& given = *fused.x_scales;
    const bool fits = given.scalar_type() == ScalarType::Float && given.dim() == 1 && given.size(0) == scale_count;
    REQUIRE(fits || is_one_scale(given), "x_scales must be float32 [], [1] or [", scale_count, "], ", each, "; got ",
            name_of(given.scalar_type()), " ", shape_of(given));
    x_scales = std::move(fused.x_scales);
    make_contiguous(x_scales);
  } else {
    REQUIRE(!int8_x || plain_sums, "x_scales are required for an int8 x; got none");
  }

  if (fused.residual) {
    const Tensor& given = *fused.residual;
    REQUIRE(is_float(given.scalar_type()), "residual must be float32, float16 or bfloat16; got ",
            name_of(given.scalar_type()));
    bool fits = given.dim() == static_cast<int64_t>(y_shape.size());
    for (int64_t i = 0; fits && i < given.dim(); ++i) fits = given.size(i) == y_shape[i];
    REQUIRE(fits, "residual must be of the shape of y, ", shape_of(y_shape), "; got ", shape_of(given));
    residual = std::move(fused.residual);
  }

  REQUIRE(fused.y_scale.has_value() == (y_type == ScalarType::Char),
          fused.y_scale ? "y_scale is for out_dtype int8 alone; got one for another"
                        : "y_scale is required for out_dtype int8; got none");
  if (fused.y_scale) {
    REQUIRE(is_one_scale(*fused.y_scale), "y_scale must be float32 [] or [1]; got ",
            name_of(fused.y_scale->scalar_type()), " ", shape_of(*fused.y_scale));
    y_scale = std::move(fused.y_scale);
  }
}

Epilogue ProductOperands::epilogue(const Tensor& y) const {
  constexpr int64_t LIMIT = int64_t{1} << 31;
  REQUIRE(tokens < LIMIT && out_features < LIMIT, "x must have fewer than 2^31 rows, and a weight too; got ", tokens,
          " and ", out_features);
  Epilogue epilogue{};
  epilogue.y = y.mutable_data_ptr();
  epilogue.y_stride = out_features;
  epilogue.y_type = number_of(y_type);
  if (bias) epilogue.bias = bias->const_data_ptr(), epilogue.bias_type = number_of(bias->scalar_type());
  if (residual) {
    epilogue.residual = residual->const_data_ptr();
    epilogue.residual_stride = residual_stride;
    epilogue.residual_type = number_of(residual->scalar_type());
  }
  epilogue.scales = floats_of(scales);
  epilogue.x_scales = floats_of(x_scales);
  epilogue.x_scale_step = x_scales && x_scales->numel() > 1 ? 1 : 0;
  epilogue.y_scale = floats_of(y_scale);
  epilogue.activation = activation;
  epilogue.out_features = static_cast<int32_t>(out_features);
  epilogue.tokens = static_cast<int32_t>(tokens);
  return epilogue;
}

LinearOperands::LinearOperands(const Tensor& x_in, std::optional<Tensor> bias_in, std::optional<Tensor> scales_in,
                               int64_t out_features_in, int64_t in_features_in, const std::string& dtype,
                               const std::string& activation_in, bool weight_only_in, int64_t group_size_in,
                               FusedOperands* fused)
    : ProductOperands(x_in.scalar_type(), std::move(bias_in), std::move(scales_in), out_features_in, in_features_in,
                      dtype, activation_in, weight_only_in, group_size_in, fused),
      x(x_in) {
  const int64_t dims = x.dim();
  REQUIRE(dims >= 1 && x.size(dims - 1) == in_features, "x must be [..., ", in_features, "] to match weight [",
          out_features, ", ", in_features, "]; got ", shape_of(x));
  y_shape.assign(x.sizes().begin(), x.sizes().end());
  y_shape.back() = out_features;
  tokens = 1;
  for (int64_t i = 0; i < dims - 1; ++i) tokens *= y_shape[i];
  if (!rows_are_regular(x, x_stride)) {
    x = torch::stable::contiguous(x);
    x_stride = in_features;
  }
  if (!fused) return;
  take(*fused, y_shape, tokens, "one a token");
  if (residual && !rows_are_regular(*residual, residual_stride)) {
    residual = torch::stable::contiguous(*residual);
    residual_stride = out_features;
  }
}

void ConvGeometry::check() const {
  REQUIRE(groups > 0 && in_channels > 0 && in_channels % groups == 0 && out_channels >= 0 && out_channels % groups == 0,
          "groups must divide in_channels and out_channels; got groups ", groups, ", in_channels ", in_channels,
          ", out_channels ", out_channels);
  const auto both = [](const char* name, const std::vector<int64_t>& pair, int64_t least) {
    REQUIRE(pair.size() == 2 && pair[0] >= least && pair[1] >= least, name, " must be two numbers of at least ", least,
            "; got ", shape_of(pair));
  };
  both("kernel_size", kernel_size, 1), both("stride", stride, 1), both("padding", padding, 0);
  both("dilation", dilation, 1);
}

int64_t ConvGeometry::out_extent(int64_t extent, int dim) const {
  const int64_t room = extent + 2 * padding[dim] - dilation[dim] * (kernel_size[dim] - 1) - 1;
  return room < 0 ? 0 : room / stride[dim] + 1;
}

namespace {

constexpr auto CHANNELS_LAST = torch::headeronly::MemoryFormat::ChannelsLast;

// What `compress` makes of a conv weight, as the columns of a linear one.
int64_t conv_features(const ConvGeometry& geometry, const std::string& dtype) {
  geometry.check();
  const Pattern pattern = cpu::pattern_of(linear_element(dtype));
  return geometry.kernel_size[0] * geometry.kernel_size[1] * group_columns(pattern) *
         group_count(pattern, geometry.in_channels / geometry.groups);
}

// Each channel next to the other, or each column, whatever the other strides.
bool has_unit_channels(const Tensor& x) { return x.size(1) <= 1 || x.stride(1) == 1; }
bool has_unit_columns(const Tensor& x) { return x.size(3) <= 1 || x.stride(3) == 1; }

}  // namespace

ConvOperands::ConvOperands(const Tensor& x_in, std::optional<Tensor> bias_in, std::optional<Tensor> scales_in,
                           const ConvGeometry& geometry, const std::string& dtype, const std::string& activation_in,
                           bool weight_only_in, FusedOperands& fused)
    : ProductOperands(x_in.scalar_type(), std::move(bias_in), std::move(scales_in), geometry.out_channels,
                      conv_features(geometry, dtype), dtype, activation_in, weight_only_in, 0, &fused),
      x(x_in) {
  REQUIRE(x.dim() == 4 && x.size(1) == geometry.in_channels, "x must be [B, ", geometry.in_channels,
          ", H, W] for in_channels = ", geometry.in_channels, "; got ", shape_of(x));
  y_shape = {x.size(0), out_features, geometry.out_extent(x.size(2), 0), geometry.out_extent(x.size(3), 1)};
  REQUIRE(y_shape[2] > 0 && y_shape[3] > 0, "x must be at least as large as the kernel, ",
          shape_of(geometry.kernel_size), " with its dilation; got ", shape_of(x), " and padding ",
          shape_of(geometry.padding));
  tokens = y_shape[0] * y_shape[2] * y_shape[3];
  channels_last = has_unit_channels(x) && !x.is_contiguous();
  if (!has_unit_channels(x) && !has_unit_columns(x)) x = torch::stable::contiguous(x);
  take(fused, y_shape, y_shape[0], "one an image");
  if (residual) {
    residual = torch::stable::contiguous(*residual, CHANNELS_LAST);
    residual_stride = out_features;
  }
}

}  // namespace sparse24
