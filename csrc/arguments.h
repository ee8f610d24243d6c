// Reading an operator's arguments: names to enums, shapes, and errors that name the argument, the rule and what came.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/format.cuh"

namespace sparse24 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());  // torch turns it into RuntimeError with exactly this text
}

// Refuses the call with the parts, joined, when the rule does not hold. A macro, so that a call that is right spends
// nothing on the text of a wrong one.
#define REQUIRE(RULE, ...)                        \
  do {                                            \
    if (!(RULE)) ::sparse24::refuse(__VA_ARGS__); \
  } while (0)

inline std::string shape_of(const std::vector<int64_t>& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}
inline std::string shape_of(const Tensor& tensor) {
  return shape_of(std::vector<int64_t>(tensor.sizes().begin(), tensor.sizes().end()));
}

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "another dtype";
  }
}

// The dtype whose tensors hold elements of this type; int4 lies packed in uint8.
inline ScalarType storage_of(Element element) {
  switch (element) {
    case Element::F32:
      return ScalarType::Float;
    case Element::F16:
      return ScalarType::Half;
    case Element::BF16:
      return ScalarType::BFloat16;
    case Element::I8:
      return ScalarType::Char;
    default:
      return ScalarType::Byte;
  }
}

inline Element element_of(const std::string& dtype) {
  if (dtype == "float32") return Element::F32;
  if (dtype == "float16") return Element::F16;
  if (dtype == "bfloat16") return Element::BF16;
  if (dtype == "int8") return Element::I8;
  REQUIRE(dtype == "int4", "dtype must be float32, float16, bfloat16, int8 or int4; got ", dtype);
  return Element::I4;
}

// The element type of a tensor of weights or values.
inline Element element_of(const char* argument, ScalarType type) {
  for (const Element element : {Element::F32, Element::F16, Element::BF16, Element::I8, Element::I4}) {
    if (type == storage_of(element)) return element;
  }
  refuse(argument, " must be float32, float16, bfloat16, int8 or uint8 (packed int4); got ", name_of(type));
  return Element::F32;
}

inline Pattern pattern_of(const std::string& pattern) {
  if (pattern == "2:4") return Pattern::TWO_FOUR;
  if (pattern == "1:2") return Pattern::ONE_TWO;
  REQUIRE(pattern == "pair 4:8", "pattern must be '2:4', '1:2' or 'pair 4:8'; got '", pattern, "'");
  return Pattern::PAIR_FOUR_EIGHT;
}

// Checks a canonical pair against in_features and returns the number of rows.
inline int64_t check_compressed(const Tensor& values, const Tensor& meta, int64_t in_features, Element element,
                                Pattern pattern) {
  REQUIRE(in_features >= 0, "in_features must not be negative; got ", in_features);
  REQUIRE(values.scalar_type() == storage_of(element), "values must be ", name_of(storage_of(element)),
          " for the dtype asked for; got ", name_of(values.scalar_type()));
  REQUIRE(meta.scalar_type() == ScalarType::Byte, "meta must be uint8; got ", name_of(meta.scalar_type()));
  const int64_t columns =
      values_row_bytes(pattern, element, in_features) * 8 / (is_int4(element) ? 8 : element_bits(element));
  REQUIRE(values.dim() == 2 && values.size(1) == columns, "values must be [N, ", columns,
          "] for in_features = ", in_features, "; got ", shape_of(values));
  const int64_t rows = values.size(0), bytes = meta_row_bytes(pattern, in_features);
  REQUIRE(meta.dim() == 2 && meta.size(0) == rows && meta.size(1) == bytes, "meta must be [", rows, ", ", bytes,
          "] to match values ", shape_of(values), " and in_features = ", in_features, "; got ", shape_of(meta));
  REQUIRE(values.device() == meta.device(), "values and meta must be on one device; got two");
  return rows;
}

// Contiguous, without a copy where it already is.
inline Tensor dense_rows(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// torch::stable::empty and empty_strided on the device of `like`, without the microsecond of a trip through the
// dispatcher.
inline Tensor empty_strided_like_device(const Tensor& like, const std::vector<int64_t>& shape,
                                        const std::vector<int64_t>& strides, ScalarType type) {
  int32_t device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device_type,
                               device_type == aoti_torch_device_type_cpu() ? 0 : like.get_device_index(), &handle));
  return Tensor(handle);
}
inline Tensor empty_like_device(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  return empty_strided_like_device(like, shape, strides, type);
}

}  // namespace sparse24
