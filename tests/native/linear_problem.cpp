#include "tests/native/linear_problem.h"

namespace sparse24::test {

double activate(Activation activation, double x) {
  switch (activation) {
    case Activation::RELU:
      return x < 0 ? 0 : x;
    case Activation::GELU:
      return x * 0.5 * std::erfc(-x / std::sqrt(2.0));
    case Activation::GELU_TANH:
      return x / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::SILU:
      return x / (1 + std::exp(-x));
    default:
      return x;
  }
}

Problem::Problem(Weight weight, Element x_element, Shape shape, Random& random, bool integers, int64_t group_size)
    : weight(weight),
      x_element(x_element),
      y_type(x_element == Element::I8 ? Number::F32 : static_cast<Number>(x_element)),
      shape(shape),
      unit(weight.element == Element::I4 ? 2 : 1),
      group_size(group_size) {
  const auto [tokens, out_features, in_features] = shape;
  const Pattern pattern = cpu::pattern_of(weight.element);
  const int64_t groups = group_count(pattern, in_features);
  slots = 2 * unit * groups, meta_bytes = meta_row_bytes(pattern, in_features);
  const auto number = [&](Element element) {
    return integers ? static_cast<double>(random.between(-4, 4)) : round_to(element, 4 * random.uniform() - 2);
  };
  const auto weight_value = [&] {
    return weight.element == Element::I8 ? static_cast<double>(random.between(-128, 127))
           : is_int4(weight.element)     ? static_cast<double>(random.between(-8, 7))
                                         : number(weight.element);
  };
  for (int64_t i = 0; i < out_features * groups; ++i) codes.push_back(CODES[random.below(6)]);
  for (int64_t i = 0; i < out_features * slots; ++i) {
    const double value = weight_value();
    values.push_back(column(i / slots, i % slots) < in_features ? value : 0);
  }
  for (int64_t i = 0; i < tokens * in_features; ++i) {
    x.push_back(x_element == Element::I8 ? static_cast<double>(random.between(-128, 127)) : number(x_element));
  }
  for (int64_t i = 0; i < out_features; ++i) bias.push_back(number(Element::BF16));
  for (int64_t i = 0; i < cpu::scale_groups(in_features, group_size) * out_features; ++i) {
    const double whole = group_size ? static_cast<double>(1 << random.below(3)) : 1;
    scales.push_back(integers ? whole : round_to(Element::F32, 0.01 + random.uniform()));
  }
  for (int64_t i = 0; i < tokens * out_features; ++i) residual.push_back(number(Element::BF16));
  for (int64_t i = 0; i < tokens; ++i)
    x_scales.push_back(integers ? 1 : round_to(Element::F32, 0.01 + random.uniform()));
}

static Element element_of(Number number) { return static_cast<Element>(static_cast<int>(number)); }
static_assert(static_cast<int>(Number::F32) == static_cast<int>(Element::F32) &&
              static_cast<int>(Number::I8) == static_cast<int>(Element::I8));

std::string Problem::describe() const {
  return std::string(name(cpu::active_isa())) + " weight " + name(weight) + " x " + name(x_element) + " y " +
         std::to_string(static_cast<int>(y_type)) + " bias " + (has_bias ? name(element_of(bias_type)) : "none") +
         " residual " + (has_residual ? name(element_of(residual_type)) : "none") + " activation " +
         std::to_string(static_cast<int>(activation)) + " M " + std::to_string(shape.tokens) + " N " +
         std::to_string(shape.out_features) + " K " + std::to_string(shape.in_features) + " in groups of " +
         std::to_string(group_size);
}

std::vector<double> Problem::seen(int64_t token, float& scale) const {
  std::vector<double> row(x.begin() + token * shape.in_features, x.begin() + (token + 1) * shape.in_features);
  if (weight.element == Element::BF16) {
    for (double& v : row) v = round_to(Element::BF16, v);
  }
  if (x_element == Element::I8) scale = static_cast<float>(x_scales[one_x_scale ? 0 : token]);
  if (!weight.rounds_x() || x_element == Element::I8) return row;
  float amax = 0;
  bool finite = true;
  for (double v : row) finite = finite && std::isfinite(v), amax = std::max(amax, std::fabs(static_cast<float>(v)));
  scale = finite ? amax / 127.0f : std::numeric_limits<float>::quiet_NaN();
  if (scale == 0) scale = 1;
  for (double& v : row) {
    v = finite ? std::clamp(std::nearbyint(static_cast<float>(v) / scale), -127.0f, 127.0f) : 0;
  }
  return row;
}

std::vector<double> Problem::run() const {
  const auto [tokens, out_features, in_features] = shape;
  const Element element = weight.element;
  const int64_t groups = slots / (2 * unit), bits = element_bits(element);
  Guarded<uint8_t> canonical(out_features * slots * bits / 8, bits / 8 + 1), meta(out_features * meta_bytes);
  std::fill(canonical.begin(), canonical.end(), 0), std::fill(meta.begin(), meta.end(), 0);
  for (int64_t i = 0; i < out_features * slots; ++i) {
    const uint32_t value = encode(element, values[i]);
    if (is_int4(element)) {
      canonical.data()[i / 2] |= static_cast<uint8_t>((value & 15) << i % 2 * 4);
    } else {
      std::memcpy(canonical.data() + i * bits / 8, &value, bits / 8);
    }
  }
  for (int64_t n = 0; n < out_features; ++n) {
    for (int64_t g = 0; g < groups; ++g) {
      meta[n * meta_bytes + g / 2] |= static_cast<uint8_t>(codes[n * groups + g] << g % 2 * 4);
    }
  }
  Guarded<uint8_t> packed(cpu::packed_bytes(element, out_features, in_features, group_size), 64);
  canonical.make_read_only(), meta.make_read_only();
  cpu::pack(canonical.data(), meta.data(), element, out_features, in_features, packed.data(), group_size);

  const int64_t x_stride = in_features + x_gap, y_stride = out_features + y_gap;
  Array input(x_element, tokens == 0 ? 0 : (tokens - 1) * x_stride + in_features);
  for (int64_t m = 0; m < tokens; ++m) {
    const int64_t at = (x_backwards ? tokens - 1 - m : m) * x_stride;
    for (int64_t k = 0; k < in_features; ++k) input.set(at + k, x[m * in_features + k]);
  }
  const std::vector<double> none;
  Array bias_array(element_of(bias_type), has_bias ? bias : none);
  Array residual_array(element_of(residual_type), has_residual ? residual : none);
  Array scale_array(Element::F32, scales), x_scale_array(Element::F32, x_scales);
  Array y_scale_array(Element::F32, std::vector<double>{y_scale});
  packed.make_read_only(), input.memory().make_read_only();

  const bool plain_sums = y_type == Number::I32;
  // int32 as float32: the same bytes.
  Array output(plain_sums ? Element::F32 : element_of(y_type),
               tokens == 0 ? 0 : (tokens - 1) * y_stride + out_features);
  const int64_t first = x_backwards && tokens > 0 ? (tokens - 1) * x_stride * element_bits(x_element) / 8 : 0;
  const auto floats = [](Array& array) { return reinterpret_cast<const float*>(array.data()); };
  const Preferred preferred(weight, x_element);
  cpu::linear({.x = input.data() + first,
               .x_stride = x_backwards ? -x_stride : x_stride,
               .x_element = x_element,
               .packed = packed.data(),
               .weight = element,
               .weight_only = weight.weight_only,
               .in_features = in_features,
               .epilogue = {.y = output.data(),
                            .bias = has_bias ? bias_array.data() : nullptr,
                            .residual = has_residual ? residual_array.data() : nullptr,
                            .scales = weight.is_integer() && !plain_sums ? floats(scale_array) : nullptr,
                            .x_scales = x_element == Element::I8 && !plain_sums ? floats(x_scale_array) : nullptr,
                            .y_scale = y_type == Number::I8 ? floats(y_scale_array) : nullptr,
                            .y_stride = y_stride,
                            .residual_stride = out_features,
                            .y_type = y_type,
                            .bias_type = bias_type,
                            .residual_type = residual_type,
                            .activation = activation,
                            .x_scale_step = one_x_scale ? 0 : 1,
                            .out_features = static_cast<int32_t>(out_features),
                            .tokens = static_cast<int32_t>(tokens)},
               .group_size = group_size});

  std::vector<double> y;
  for (int64_t m = 0; m < tokens; ++m) {
    for (int64_t n = 0; n < out_features; ++n) {
      const int64_t at = m * y_stride + n;
      y.push_back(plain_sums ? static_cast<int32_t>(output.bits(at)) : output[at]);
    }
    for (int64_t n = out_features; n < y_stride && m + 1 < tokens; ++n) {
      const uint32_t untouched = y_type == Number::I8 ? 0xff : element_bits(element_of(y_type)) == 16 ? 0xffff : ~0u;
      CHECK(output.bits(m * y_stride + n) == untouched, "written between rows of y: ", describe());
    }
  }
  return y;
}

void Problem::check(const std::vector<double>& y, bool integers) const {
  const auto [tokens, out_features, in_features] = shape;
  const bool exact_sums = weight.rounds_x();
  const double output_unit = y_type == Number::F32 ? 0x1p-24 : y_type == Number::F16 ? 0x1p-11 : 0x1p-8;
  for (int64_t m = 0; m < tokens; ++m) {
    float x_scale = 0;
    const std::vector<double> row = seen(m, x_scale);
    for (int64_t n = 0; n < out_features; ++n) {
      const int64_t groups = cpu::scale_groups(in_features, group_size);
      std::vector<double> sums(groups), magnitudes(groups);
      for (int64_t slot = 0; slot < slots; ++slot) {
        const int64_t k = column(n, slot);
        if (k >= in_features) continue;
        const double product = values[n * slots + slot] * row[k];
        const int64_t group = group_size ? k / group_size : 0;
        sums[group] += product, magnitudes[group] += std::fabs(product);
      }
      double sum = sums[0], magnitude = magnitudes[0];
      const double got = y[m * out_features + n];
      if (y_type == Number::I32) {
        CHECK(got == sum, describe(), ": y[", m, ", ", n, "] = ", got, ", expected ", sum);
        continue;
      }
      const double b = has_bias ? round_to(element_of(bias_type), bias[n]) : 0;
      const double r = has_residual ? round_to(element_of(residual_type), residual[m * out_features + n]) : 0;
      const auto scale = static_cast<float>(weight.is_integer() ? scales[n] : 1);
      float total = 0;  // each operation rounds to float
      for (int64_t group = 0; group < groups && exact_sums; ++group) {
        total = total + static_cast<float>(sums[group]) * static_cast<float>(scales[group * out_features + n]);
      }
      if (exact_sums) {
        sum = group_size ? total * x_scale : static_cast<float>(sum) * (x_scale * scale);
        if (has_bias) sum = static_cast<float>(sum) + static_cast<float>(b);
        if (has_residual) sum = static_cast<float>(sum) + static_cast<float>(r);
      } else {
        sum *= scale, magnitude *= scale;
        for (int64_t group = 1; group < groups; ++group) {
          sum += sums[group] * scales[group * out_features + n];
          magnitude += magnitudes[group] * scales[group * out_features + n];
        }
        sum += b + r;
      }
      const double expected = activate(activation, sum);
      const bool exact = (integers || exact_sums) && (activation == Activation::NONE || activation == Activation::RELU);
      double bound = exact ? 0 : 0x1p-140;
      if (!exact && activation > Activation::RELU)
        bound += 6 * 0x1p-23 * std::fabs(expected) + 0x1p-24 * std::fabs(sum);
      // No activation is steeper than 1.13.
      if (!integers && !exact_sums) {
        bound += 1.13 * (in_features + 2) * 0x1p-24 * (magnitude + std::fabs(b) + std::fabs(r));
      }
      if (y_type == Number::I8) {
        const auto quantized = [&](double v) {
          return std::clamp(std::nearbyint(static_cast<float>(v) / static_cast<float>(y_scale)), -127.0f, 127.0f);
        };
        const bool inside = got >= quantized(expected - bound) && got <= quantized(expected + bound);
        CHECK(inside || (got == 0 && std::isnan(expected)), describe(), ": y[", m, ", ", n, "] = ", got, ", expected ",
              quantized(expected));
        continue;
      }
      if (std::isnan(expected)) {
        CHECK(std::isnan(got), describe(), ": y[", m, ", ", n, "] = ", got, ", expected NaN");
        continue;
      }
      if (!exact) bound += output_unit * std::fabs(expected);
      if (!exact && y_type == Number::F16) bound += 0x1p-25;  // half a subnormal
      const double target = exact ? round_to(element_of(y_type), expected) : expected;
      // Integers have no -0.
      CHECK(!exact_sums || !exact || std::signbit(got) == std::signbit(target), describe(), ": -0");
      CHECK(std::fabs(got - target) <= bound || got == round_to(element_of(y_type), target), describe(), ": y[", m,
            ", ", n, "] = ", got, ", expected ", target, " within ", bound);
    }
  }
}

}  // namespace sparse24::test
