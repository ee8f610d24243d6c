// csrc/cpu/linear.h on every instruction set of this machine, against plain loops in double. Every buffer ends at an
// inaccessible page, inputs are read-only, and what lies between rows is NaN (x) or watched (y).
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "csrc/cpu/isa.h"
#include "csrc/cpu/linear.h"
#include "tests/native/check.h"
#include "tests/native/parallel.h"

using namespace sparse24;
using namespace sparse24::cpu;
using sparse24::test::Guarded;
using sparse24::test::Random;

namespace {

constexpr int CODES[] = {code_of(0, 1), code_of(0, 2), code_of(1, 2), code_of(0, 3), code_of(1, 3), code_of(2, 3)};
constexpr Element WEIGHTS[] = {Element::F32, Element::F16, Element::BF16, Element::I8};
constexpr Element FLOATS[] = {Element::F32, Element::F16, Element::BF16};
constexpr Activation ACTIVATIONS[] = {Activation::NONE, Activation::RELU, Activation::GELU, Activation::GELU_TANH,
                                      Activation::SILU};
constexpr double INFINITE = std::numeric_limits<double>::infinity();
constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();

const char* name(Element element) {
  return element == Element::F32 ? "f32" : element == Element::F16 ? "f16" : element == Element::BF16 ? "bf16" : "i8";
}
const char* name(Isa isa) {
  return isa == Isa::PORTABLE ? "portable" : isa == Isa::AVX2 ? "avx2" : isa == Isa::AVX512 ? "avx512" : "avx512_bf16";
}

template <class Body>
void for_each_isa(const Body& body) {
  for (int isa = 0; isa <= static_cast<int>(best_isa()); ++isa) {
    force_isa(static_cast<Isa>(isa));
    body();
  }
  force_isa(best_isa());
}

// ---- Numbers: element types by their definition, in double ----

struct Binary {  // an IEEE format of `1 + exponent + fraction` bits
  int fraction, bias;
};
constexpr Binary binary(Element element) {
  return element == Element::F32 ? Binary{23, 127} : element == Element::F16 ? Binary{10, 15} : Binary{7, 127};
}

// The nearest number of the format, ties to even.
double round_to(Element element, double value) {
  const Binary format = binary(element);
  if (value == 0 || !std::isfinite(value)) return value;
  const int exponent = std::max(std::ilogb(value), 1 - format.bias);
  const double quantum = std::ldexp(1, exponent - format.fraction);
  const double rounded = std::nearbyint(value / quantum) * quantum;
  return std::fabs(rounded) >= std::ldexp(1, format.bias + 1) ? std::copysign(INFINITE, value) : rounded;
}

uint32_t encode(Element element, double value) {
  if (element == Element::I8) return static_cast<uint8_t>(static_cast<int8_t>(value));
  const Binary format = binary(element);
  const int bits = element_bits(element);
  const uint32_t sign = std::signbit(value) ? 1u << (bits - 1) : 0;
  const uint32_t infinite = ((1u << (bits - 1 - format.fraction)) - 1) << format.fraction;
  const double magnitude = std::fabs(round_to(element, value));
  if (std::isnan(value)) return sign | infinite | 1u << (format.fraction - 1);
  if (std::isinf(magnitude)) return sign | infinite;
  if (magnitude == 0) return sign;
  const int exponent = std::max(std::ilogb(magnitude), 1 - format.bias);
  // The hidden bit of a normal number adds one to the exponent's field.
  const uint32_t below = static_cast<uint32_t>(exponent + format.bias - 1) << format.fraction;
  return sign | (below + static_cast<uint32_t>(std::ldexp(magnitude, format.fraction - exponent)));
}

double decode(Element element, uint32_t bits) {
  if (element == Element::I8) return static_cast<int8_t>(bits);
  const Binary format = binary(element);
  const int exponent_bits = element_bits(element) - 1 - format.fraction;
  const int exponent = static_cast<int>(bits >> format.fraction) & ((1 << exponent_bits) - 1);
  const double fraction = bits & ((1u << format.fraction) - 1);
  const double magnitude =
      exponent == (1 << exponent_bits) - 1 ? (fraction == 0 ? INFINITE : NOT_A_NUMBER)
      : exponent == 0 ? std::ldexp(fraction, 1 - format.bias - format.fraction)
                      : std::ldexp(fraction + std::ldexp(1, format.fraction), exponent - format.bias - format.fraction);
  return bits >> (element_bits(element) - 1) & 1 ? -magnitude : magnitude;
}

// An array of any element type between inaccessible pages; made of NaN (all bits set).
class Array {
 public:
  Array(Element element, int64_t size)
      : element_(element), bytes_(element_bits(element) / 8), memory_(size * bytes_, bytes_) {
    std::memset(memory_.data(), 0xff, memory_.bytes());
  }
  void set_bits(int64_t i, uint32_t bits) { std::memcpy(memory_.data() + i * bytes_, &bits, bytes_); }
  uint32_t bits(int64_t i) const {
    uint32_t bits = 0;
    std::memcpy(&bits, memory_.data() + i * bytes_, bytes_);
    return bits;
  }
  void set(int64_t i, double value) { set_bits(i, encode(element_, value)); }
  double operator[](int64_t i) const { return decode(element_, bits(i)); }
  Guarded<uint8_t>& memory() { return memory_; }
  uint8_t* data() { return memory_.data(); }

 private:
  Element element_;
  int bytes_;
  Guarded<uint8_t> memory_;
};

// ---- One call, and what it should give ----

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

struct Shape {
  int64_t tokens, out_features, in_features;
};

// W random in 2:4 with every code, x, bias and scales; the caller may set any of them before run().
struct Problem {
  Element weight, x_element, bias_element = Element::F32;
  bool has_bias = true;
  Activation activation = Activation::NONE;
  Shape shape;
  int64_t x_gap = 0, y_gap = 0;  // elements between the end of a row and the start of the next
  bool x_backwards = false;      // the rows of x lie in memory from the last to the first

  int64_t slots, meta_bytes;
  std::vector<double> values;  // [N, slots]
  std::vector<uint8_t> codes;  // [N, groups]
  std::vector<double> x;       // [M, K]
  std::vector<double> bias, scales;

  Problem(Element weight, Element x_element, Shape shape, Random& random, bool integers)
      : weight(weight), x_element(x_element), shape(shape) {
    const auto [tokens, out_features, in_features] = shape;
    const int64_t groups = group_count(Pattern::TWO_FOUR, in_features);
    slots = 2 * groups, meta_bytes = meta_row_bytes(Pattern::TWO_FOUR, in_features);
    const auto number = [&](Element element) {
      return integers ? static_cast<double>(random.between(-4, 4)) : round_to(element, 4 * random.uniform() - 2);
    };
    for (int64_t i = 0; i < out_features * groups; ++i) codes.push_back(CODES[random.below(6)]);
    for (int64_t i = 0; i < out_features * slots; ++i) {
      const double value = weight == Element::I8 ? static_cast<double>(random.between(-128, 127)) : number(weight);
      values.push_back(column(i / slots, i % slots) < in_features ? value : 0);
    }
    for (int64_t i = 0; i < tokens * in_features; ++i) x.push_back(number(x_element));
    for (int64_t i = 0; i < out_features; ++i) {
      bias.push_back(number(Element::BF16));
      scales.push_back(integers ? 1 : round_to(Element::F32, 0.01 + random.uniform()));
    }
  }

  int64_t column(int64_t n, int64_t slot) const {
    const int code = codes[n * (slots / 2) + slot / 2];
    return slot / 2 * 4 + (slot % 2 == 0 ? first_of(code) : second_of(code));
  }

  // y [M, N] as doubles, after checking that nothing else was written.
  std::vector<double> run() const;

  // The row of x that the kernels see, and for I8 weights its scale: the rule of linear.h in plain floats.
  std::vector<double> seen(int64_t token, float& scale) const {
    std::vector<double> row(x.begin() + token * shape.in_features, x.begin() + (token + 1) * shape.in_features);
    if (weight == Element::BF16) {
      for (double& v : row) v = round_to(Element::BF16, v);
    }
    if (weight != Element::I8) return row;
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

  // Checks y: exact up to the activation where the data are integers (and always for I8), else within the bound.
  void check(const std::vector<double>& y, bool integers) const;

  std::string describe() const {
    return std::string(name(active_isa())) + " weight " + name(weight) + " x " + name(x_element) + " bias " +
           (has_bias ? name(bias_element) : "none") + " activation " + std::to_string(static_cast<int>(activation)) +
           " M " + std::to_string(shape.tokens) + " N " + std::to_string(shape.out_features) + " K " +
           std::to_string(shape.in_features);
  }
};

std::vector<double> Problem::run() const {
  const auto [tokens, out_features, in_features] = shape;
  Array canonical(weight, out_features * slots);
  Guarded<uint8_t> meta(out_features * meta_bytes);
  std::fill(meta.begin(), meta.end(), 0);
  for (int64_t i = 0; i < out_features * slots; ++i) canonical.set(i, values[i]);
  for (int64_t n = 0; n < out_features; ++n) {
    for (int64_t g = 0; g < slots / 2; ++g) {
      meta[n * meta_bytes + g / 2] |= static_cast<uint8_t>(codes[n * (slots / 2) + g] << g % 2 * 4);
    }
  }
  Guarded<uint8_t> packed(packed_bytes(weight, out_features, in_features), 64);
  canonical.memory().make_read_only(), meta.make_read_only();
  pack(canonical.data(), meta.data(), weight, out_features, in_features, packed.data());

  const int64_t x_stride = in_features + x_gap, y_stride = out_features + y_gap;
  Array input(x_element, tokens == 0 ? 0 : (tokens - 1) * x_stride + in_features);
  for (int64_t m = 0; m < tokens; ++m) {
    const int64_t at = (x_backwards ? tokens - 1 - m : m) * x_stride;
    for (int64_t k = 0; k < in_features; ++k) input.set(at + k, x[m * in_features + k]);
  }
  Array bias_array(bias_element, has_bias ? out_features : 0), scale_array(Element::F32, out_features);
  for (int64_t n = 0; n < out_features; ++n) {
    if (has_bias) bias_array.set(n, bias[n]);
    scale_array.set(n, scales[n]);
  }
  packed.make_read_only(), input.memory().make_read_only();
  bias_array.memory().make_read_only(), scale_array.memory().make_read_only();

  Array output(x_element, tokens == 0 ? 0 : (tokens - 1) * y_stride + out_features);
  const int64_t first = x_backwards && tokens > 0 ? (tokens - 1) * x_stride * element_bits(x_element) / 8 : 0;
  linear({.x = input.data() + first,
          .x_stride = x_backwards ? -x_stride : x_stride,
          .x_element = x_element,
          .packed = packed.data(),
          .weight_element = weight,
          .scales = weight == Element::I8 ? reinterpret_cast<const float*>(scale_array.data()) : nullptr,
          .bias = has_bias ? bias_array.data() : nullptr,
          .bias_element = bias_element,
          .activation = activation,
          .y = output.data(),
          .y_stride = y_stride,
          .tokens = tokens,
          .out_features = out_features,
          .in_features = in_features});

  std::vector<double> y;
  for (int64_t m = 0; m < tokens; ++m) {
    for (int64_t n = 0; n < out_features; ++n) y.push_back(output[m * y_stride + n]);
    for (int64_t n = out_features; n < y_stride && m + 1 < tokens; ++n) {
      CHECK(std::isnan(output[m * y_stride + n]), "written between rows of y: ", describe());
    }
  }
  return y;
}

void Problem::check(const std::vector<double>& y, bool integers) const {
  const auto [tokens, out_features, in_features] = shape;
  const double output_unit = x_element == Element::F32 ? 0x1p-24 : x_element == Element::F16 ? 0x1p-11 : 0x1p-8;
  for (int64_t m = 0; m < tokens; ++m) {
    float token_scale = 0;
    const std::vector<double> row = seen(m, token_scale);
    for (int64_t n = 0; n < out_features; ++n) {
      double sum = 0, magnitude = 0;
      for (int64_t slot = 0; slot < slots; ++slot) {
        if (column(n, slot) >= in_features) continue;
        const double product = values[n * slots + slot] * row[column(n, slot)];
        sum += product, magnitude += std::fabs(product);
      }
      const double b = has_bias ? round_to(bias_element, bias[n]) : 0;
      const double got = y[m * out_features + n];
      if (weight == Element::I8) {  // each operation rounds to float
        sum = static_cast<float>(sum) * (token_scale * static_cast<float>(scales[n]));
        if (has_bias) sum = static_cast<float>(sum) + static_cast<float>(b);
      } else {
        sum += b;
      }
      const double expected = activate(activation, sum);
      if (std::isnan(expected)) {
        CHECK(std::isnan(got), describe(), ": y[", m, ", ", n, "] = ", got, ", expected NaN");
        continue;
      }
      const bool exact =
          (integers || weight == Element::I8) && (activation == Activation::NONE || activation == Activation::RELU);
      double bound = 0;
      if (!exact) bound = output_unit * std::fabs(expected) + 0x1p-140;
      if (!exact && activation > Activation::RELU)
        bound += 6 * 0x1p-23 * std::fabs(expected) + 0x1p-24 * std::fabs(sum);
      // No activation is steeper than 1.13.
      if (!integers && weight != Element::I8) bound += 1.13 * (in_features + 2) * 0x1p-24 * (magnitude + std::fabs(b));
      if (x_element == Element::F16) bound = exact ? 0 : bound + 0x1p-25;  // half a subnormal
      const double target = exact ? round_to(x_element, expected) : expected;
      // Integers have no -0.
      CHECK(weight != Element::I8 || !exact || std::signbit(got) == std::signbit(target), describe(), ": -0");
      CHECK(std::fabs(got - target) <= bound || got == target, describe(), ": y[", m, ", ", n, "] = ", got,
            ", expected ", target, " within ", bound);
    }
  }
}

// ---- Tests ----

// Every combination of the edges of M, N and K; what else may vary is drawn.
void test_shapes() {
  std::vector<Shape> shapes;
  for (int64_t tokens : {0, 1, 2, 5, 27, 28, 29, 57}) {
    for (int64_t out_features : {1, 15, 16, 17, 33}) {
      for (int64_t in_features : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 31, 32, 33, 63, 64, 65, 100}) {
        shapes.push_back({tokens, out_features, in_features});
      }
    }
  }
  shapes.push_back({3, 0, 7});
  for (int64_t tokens = 1; tokens <= 28; ++tokens) shapes.push_back({tokens, 17, 200});
  for_each_isa([&] {
    Random random(1);
    for (const Shape& shape : shapes) {
      for (Element weight : WEIGHTS) {
        const bool integers = random.below(2) == 0;
        Problem problem(weight, FLOATS[random.below(3)], shape, random, integers);
        problem.bias_element = FLOATS[random.below(3)];
        problem.has_bias = random.below(3) > 0;
        problem.activation = ACTIVATIONS[random.below(5)];
        problem.x_gap = random.below(2) * random.below(40);
        problem.y_gap = random.below(2) * random.below(40);
        problem.x_backwards = random.below(8) == 0;
        problem.check(problem.run(), integers);
      }
    }
  });
}

// Several batches of panels and several chunks of W, on one thread and on three.
void test_many_panels_and_chunks() {
  for (int threads : {1, 3}) {
    test::set_thread_count(threads);
    for_each_isa([] {
      for (Element weight : WEIGHTS) {
        Random random(2);
        for (const Shape& shape : {Shape{290, 20, 4100}, Shape{30, 900, 1100}}) {
          const Problem problem(weight, Element::F32, shape, random, true);
          problem.check(problem.run(), true);
        }
      }
    });
  }
  test::set_thread_count(2);
}

// Each code in every row and group, on columns that can be told apart; the dropped columns are not finite.
void test_codes_and_dropped_columns() {
  for_each_isa([] {
    for (Element weight : WEIGHTS) {
      for (int code : CODES) {
        Random random(3);
        Problem problem(weight, Element::F32, {2, 17, 128}, random, true);
        std::fill(problem.codes.begin(), problem.codes.end(), code);
        for (int64_t i = 0; i < 17 * 64; ++i) problem.values[i] = i % 2 == 0 ? 1 : 64;
        for (int64_t k = 0; k < 128; ++k) {
          const bool kept = k % 4 == first_of(code) || k % 4 == second_of(code);
          // An I8 row with an Inf is all NaN by its rule, and 127 as its largest makes its scale 1.
          const double dropped = weight == Element::I8 ? 127 : k % 3 == 0 ? NOT_A_NUMBER : INFINITE;
          problem.x[k] = kept ? static_cast<double>(k) : dropped;
          problem.x[128 + k] = kept ? static_cast<double>(k % 7) - 3 : -dropped;
        }
        problem.check(problem.run(), true);
      }
    }
  });
}

// NaN and Inf at a kept column, with every activation: the row they are in, and no other.
void test_not_finite() {
  for_each_isa([] {
    for (Element weight : WEIGHTS) {
      for (Element x_element : FLOATS) {
        for (Activation activation : ACTIVATIONS) {
          for (double special : {NOT_A_NUMBER, INFINITE, -INFINITE}) {
            Random random(4);
            Problem problem(weight, x_element, {3, 18, 40}, random, true);
            problem.activation = activation;
            std::fill(problem.codes.begin(), problem.codes.end(), code_of(1, 2));
            std::fill(problem.values.begin(), problem.values.end(), 1);
            problem.x[40 + 4 * 4 + 1] = special;
            const std::vector<double> y = problem.run();
            problem.check(y, true);
            for (int64_t n = 0; n < 18; ++n) CHECK(!std::isfinite(y[18 + n]) || special < 0, problem.describe());
          }
        }
      }
    }
  });
}

// Values and codes come back from the packed form to the bit, whatever they are; the kernels survive any codes.
void test_pack_any_bytes() {
  Random random(5);
  for (Element weight : WEIGHTS) {
    for (int64_t out_features : {0, 1, 16, 17, 40}) {
      for (int64_t in_features = 0; in_features <= 133; ++in_features) {
        const int64_t values_bytes = out_features * values_row_bytes(Pattern::TWO_FOUR, weight, in_features);
        const int64_t meta_bytes = out_features * meta_row_bytes(Pattern::TWO_FOUR, in_features);
        Guarded<uint8_t> values(values_bytes), meta(meta_bytes), values_back(values_bytes), meta_back(meta_bytes);
        for (uint8_t& byte : values) byte = static_cast<uint8_t>(random.bits());
        for (uint8_t& byte : meta) byte = static_cast<uint8_t>(random.bits());
        values.make_read_only(), meta.make_read_only();
        Guarded<uint8_t> packed(packed_bytes(weight, out_features, in_features), 64);
        pack(values.data(), meta.data(), weight, out_features, in_features, packed.data());
        packed.make_read_only();
        unpack(packed.data(), weight, out_features, in_features, values_back.data(), meta_back.data());
        CHECK(std::equal(values.begin(), values.end(), values_back.begin()), name(weight), " K ", in_features);
        CHECK(std::equal(meta.begin(), meta.end(), meta_back.begin()), name(weight), " K ", in_features);

        Guarded<float> x(3 * in_features), y(3 * out_features), scales(out_features);
        for (float& v : x) v = static_cast<float>(random.uniform());
        for (float& v : scales) v = 1;
        for_each_isa([&] {
          linear({x.data(), in_features, Element::F32, packed.data(), weight, scales.data(), nullptr, Element::F32,
                  Activation::NONE, y.data(), out_features, 3, out_features, in_features});
        });
      }
    }
  }
}

// Each of the 65536 numbers of a 16-bit type, as W and as x, arrives as itself. vdpbf16ps takes subnormals for zero.
void test_widening() {
  constexpr int64_t ROWS = 4096, GROUPS = 65536 / ROWS / 2;
  for_each_isa([] {
    for (Element half : {Element::F16, Element::BF16}) {
      const bool flushes = half == Element::BF16 && active_isa() == Isa::AVX512_BF16;
      const auto expect = [&](double got, uint32_t bits, const char* what) {
        const double expected = decode(half, bits);
        const bool subnormal = std::fabs(expected) < 0x1p-126;
        CHECK(got == expected || (std::isnan(got) && std::isnan(expected)) || (flushes && subnormal && got == 0),
              name(active_isa()), " ", name(half), " ", what, " bits ", bits, " gives ", got);
      };
      Random random(6);
      for (int64_t slot = 0; slot < 2 * GROUPS; ++slot) {  // one slot at a time meets x = 1, the others x = 0
        Problem problem(half, Element::F32, {1, ROWS, 4}, random, true);
        problem.has_bias = false;
        std::fill(problem.x.begin(), problem.x.end(), 0);
        problem.x[1 + slot % 2] = 1;
        for (int64_t n = 0; n < ROWS; ++n) {
          problem.codes[n] = code_of(1, 2);
          problem.values[2 * n + slot % 2] = decode(half, static_cast<uint32_t>(slot * ROWS + n));
          problem.values[2 * n + 1 - slot % 2] = 0;
        }
        const std::vector<double> y = problem.run();
        for (int64_t n = 0; n < ROWS; ++n) expect(y[n], static_cast<uint32_t>(slot * ROWS + n), "as W");
      }
      Problem problem(half, half, {65536, 1, 1}, random, true);
      problem.has_bias = false;
      problem.codes[0] = code_of(0, 1), problem.values = {1, 0};
      for (int64_t m = 0; m < 65536; ++m) problem.x[m] = decode(half, static_cast<uint32_t>(m));
      const std::vector<double> y = problem.run();
      for (int64_t m = 0; m < 65536; ++m) expect(y[m], static_cast<uint32_t>(m), "as x");
    }
  });
}

// With K = 0, y = activation(bias): the rounding of y and the accuracy of the activations over all magnitudes.
void test_rounding_and_activations() {
  for_each_isa([] {
    for (Element y_element : FLOATS) {
      Random random(7);
      Problem problem(Element::F32, y_element, {1, 40000, 0}, random, true);
      for (double& b : problem.bias) b = decode(Element::F32, static_cast<uint32_t>(random.bits()));
      for (int64_t n = 0; n < 4000; ++n) {  // ties and their neighbours, among subnormals too
        const double tie = decode(y_element, static_cast<uint32_t>(random.below(0x7000)));
        const double next = decode(y_element, static_cast<uint32_t>(random.below(0x7000)) | 1);
        problem.bias[n] = static_cast<float>(n % 2 == 0 ? tie * (1 + 0x1p-11) : next * (1 + 0x1p-8));
      }
      for (Activation activation : {Activation::NONE, Activation::RELU}) {
        problem.activation = activation;
        problem.check(problem.run(), true);
      }
    }
    for (Activation activation : {Activation::GELU, Activation::GELU_TANH, Activation::SILU}) {
      Random random(8);
      constexpr int64_t COUNT = 400000;
      Problem problem(Element::F32, Element::F32, {1, COUNT, 0}, random, true);
      problem.activation = activation;
      for (int64_t n = 0; n < COUNT; ++n) {
        // Half evenly over [-20, 20], half over all exponents.
        problem.bias[n] = n % 2 == 0 ? round_to(Element::F32, 40 * random.uniform() - 20)
                                     : decode(Element::F32, static_cast<uint32_t>(random.bits()));
      }
      const std::vector<double> y = problem.run();
      double worst = 0;
      for (int64_t n = 0; n < COUNT; ++n) {
        const double x = problem.bias[n], expected = activate(activation, x);
        CHECK(std::isnan(y[n]) == std::isnan(expected), problem.describe(), " x ", x, " y ", y[n]);
        if (!std::isfinite(expected)) continue;
        // Units in the last place, for results above 1e-36: below, the factors of the result are subnormal. The tanh
        // form has an exponent of 2 u, whose own rounding costs |u| ulp more.
        double ulp = std::ldexp(1, std::max(std::ilogb(expected == 0 ? 0x1p-120 : expected), -120) - 23);
        if (activation == Activation::GELU_TANH) ulp *= 1 + std::fabs(x + 0.044715 * x * x * x);
        const double error = std::fabs(y[n] - expected) / ulp;
        const double limit = activation == Activation::SILU ? 3 : activation == Activation::GELU && x < -2 ? 6 : 4;
        CHECK(error <= limit, problem.describe(), " is off by ", error, " ulp at ", x);
        worst = std::max(worst, error);
      }
      std::printf("%-12s activation %d: %.2f ulp\n", name(active_isa()), static_cast<int>(activation), worst);
    }
  });
}

// The corners of the int8 rule: rows of zeros, rows so small that their scale is 0 or far off, sums at the ends of
// int32.
void test_int8_extremes() {
  for_each_isa([] {
    Random random(9);
    Problem small(Element::I8, Element::F32, {6, 20, 70}, random, false);
    small.has_bias = false;  // it would drown the rows below
    for (double& scale : small.scales) scale *= 0x1p100;
    for (int64_t k = 0; k < 70; ++k) {
      small.x[k] = 0;
      small.x[70 + k] = k % 2 == 0 ? -0.0 : 0.0;
      small.x[140 + k] = k == 3 ? 0x1p-149 : 0;
      small.x[210 + k] = k == 3 ? 0x1p-149 * 190 : k == 5 ? 0x1p-149 * -190 : 0x1p-149 * static_cast<double>(k);
      small.x[280 + k] = k % 2 == 0 ? -std::numeric_limits<float>::max() : 1;
    }
    small.check(small.run(), false);

    constexpr int64_t LONG = 262144;  // 2^31 / (127 * 128 / 2), rounded down to a power of two
    for (double x_sign : {1, -1}) {
      Problem problem(Element::I8, Element::F32, {2, 16, LONG}, random, true);
      for (int64_t i = 0; i < 16 * problem.slots; ++i) problem.values[i] = i / problem.slots % 2 == 0 ? -128 : 127;
      std::fill(problem.x.begin(), problem.x.end(), 127 * x_sign);
      problem.check(problem.run(), true);
    }
  });
}

// Ties and near-ties of x / s, where anything but an IEEE division and ties to even is off by one.
void test_int8_rounding() {
  for_each_isa([] {
    for (Element x_element : FLOATS) {
      Random random(10);
      Problem problem(Element::I8, x_element, {64, 1, 512}, random, false);
      std::fill(problem.codes.begin(), problem.codes.end(), code_of(0, 1));
      for (int64_t m = 0; m < 64; ++m) {
        const double amax =
            round_to(x_element, std::ldexp(1 + random.uniform(), static_cast<int>(random.between(-9, 9))));
        for (int64_t k = 0; k < 512; ++k) {
          const double tie = (static_cast<double>(random.between(-127, 126)) + 0.5) * (amax / 127);
          problem.x[m * 512 + k] = round_to(x_element, tie);
        }
        problem.x[m * 512] = amax;
      }
      problem.check(problem.run(), false);
    }
  });
}

void test_eight_threads_at_once() {
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 8; ++thread) {
    threads.emplace_back([thread] {
      Random random(100 + thread);
      for (int repeat = 0; repeat < 12; ++repeat) {
        const Shape shape{random.between(1, 200), random.between(1, 200), random.between(1, 400)};
        const Problem problem(WEIGHTS[repeat % 4], FLOATS[thread % 3], shape, random, true);
        problem.check(problem.run(), true);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main() {
  test_shapes();
  test_many_panels_and_chunks();
  test_codes_and_dropped_columns();
  test_not_finite();
  test_pack_any_bytes();
  test_widening();
  test_rounding_and_activations();
  test_int8_extremes();
  test_int8_rounding();
  test_eight_threads_at_once();
  std::printf("test_linear: passed on every instruction set up to %s\n", name(best_isa()));
}
