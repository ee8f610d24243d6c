// One call of csrc/cpu/linear/linear.h on numbers of one's choice, and what it should give: plain loops in double.
// Every buffer ends at an inaccessible page, inputs are read-only, and what lies between rows is NaN (x) or watched
// (y).
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "csrc/cpu/isa.h"
#include "csrc/cpu/linear/linear.h"
#include "csrc/cpu/linear/linear_choice.h"
#include "tests/native/check.h"

namespace sparse24::test {

using cpu::Isa;

constexpr int CODES[] = {code_of(0, 1), code_of(0, 2), code_of(1, 2), code_of(0, 3), code_of(1, 3), code_of(2, 3)};
constexpr Element FLOATS[] = {Element::F32, Element::F16, Element::BF16};
constexpr Activation ACTIVATIONS[] = {Activation::NONE, Activation::RELU, Activation::GELU, Activation::GELU_TANH,
                                      Activation::SILU};
constexpr double INFINITE = std::numeric_limits<double>::infinity();
constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();

// A weight as the kernels know it.
struct Weight {
  Element element;
  bool weight_only = false;

  bool is_integer() const { return element == Element::I8 || is_int4(element); }
  bool rounds_x() const { return is_integer() && !weight_only; }
};
constexpr Weight WEIGHTS[] = {{Element::F32}, {Element::F16},      {Element::BF16},     {Element::I8},
                              {Element::I4},  {Element::I8, true}, {Element::I4, true}, {Element::I4_TWO_FOUR, true}};

inline const char* name(Element element) {
  constexpr const char* NAMES[] = {"f32", "f16", "bf16", "i8", "i4", "i4 2:4"};
  return NAMES[static_cast<int>(element)];
}
inline std::string name(Weight weight) {
  return std::string(name(weight.element)) + (weight.weight_only ? " only" : "");
}
inline const char* name(Isa isa) { return cpu::name_of(isa); }

// Whether the tile kernels run what they can, however few the tokens.
inline bool prefer_amx = false;

// While it lives, products of these types run on the kernels that are preferred.
struct Preferred {
  Preferred(Weight weight, Element x_element) {
    if (!prefer_amx) return;
    for (const char* kernels : cpu::kernels_of(weight.element, weight.weight_only, x_element)) {
      if (kernels == std::string("amx")) cpu::force_kernels(kernels);
    }
  }
  ~Preferred() { cpu::force_kernels(""); }
};

// Runs body with each instruction set; with AMX a second time, preferring its kernels.
template <class Body>
void for_each_isa(const Body& body) {
  for (int isa = 0; isa <= static_cast<int>(cpu::best_isa()); ++isa) {
    cpu::force_isa(static_cast<Isa>(isa));
    body();
    if (name(static_cast<Isa>(isa)) != std::string("amx")) continue;
    prefer_amx = true;
    body();
    prefer_amx = false;
  }
  cpu::force_isa(cpu::best_isa());
}

// ---- Numbers: element types by their definition, in double ----

struct Binary {  // an IEEE format of `1 + exponent + fraction` bits
  int fraction, bias;
};
constexpr Binary binary(Element element) {
  return element == Element::F32 ? Binary{23, 127} : element == Element::F16 ? Binary{10, 15} : Binary{7, 127};
}

// The nearest number of the format, ties to even.
inline double round_to(Element element, double value) {
  const Binary format = binary(element);
  if (value == 0 || !std::isfinite(value)) return value;
  const int exponent = std::max(std::ilogb(value), 1 - format.bias);
  const double quantum = std::ldexp(1, exponent - format.fraction);
  const double rounded = std::nearbyint(value / quantum) * quantum;
  return std::fabs(rounded) >= std::ldexp(1, format.bias + 1) ? std::copysign(INFINITE, value) : rounded;
}

inline uint32_t encode(Element element, double value) {
  if (element == Element::I8 || is_int4(element)) return static_cast<uint8_t>(static_cast<int8_t>(value));
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

inline double decode(Element element, uint32_t bits) {
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
  Array(Element element, const std::vector<double>& numbers) : Array(element, static_cast<int64_t>(numbers.size())) {
    for (size_t i = 0; i < numbers.size(); ++i) set(static_cast<int64_t>(i), numbers[i]);
    memory_.make_read_only();
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

double activate(Activation activation, double x);

struct Shape {
  int64_t tokens, out_features, in_features;
};

// W random in its pattern with every code, x, bias, residual and scales; the caller may set any of them before run().
struct Problem {
  Weight weight;
  Element x_element;
  Number y_type, bias_type = Number::F32, residual_type = Number::F32;
  bool has_bias = true, has_residual = false, one_x_scale = false;
  Activation activation = Activation::NONE;
  Shape shape;
  int64_t x_gap = 0, y_gap = 0;  // elements between the end of a row and the start of the next
  bool x_backwards = false;      // the rows of x lie in memory from the last to the first

  int unit;  // columns that stay or go together
  int64_t slots, meta_bytes;
  std::vector<double> values;  // [N, slots]
  std::vector<uint8_t> codes;  // [N, groups]
  std::vector<double> x;       // [M, K]
  std::vector<double> bias, residual, x_scales;
  int64_t group_size;          // columns that share scales, or 0
  std::vector<double> scales;  // [groups of them, N]
  double y_scale = 1;

  // x_element I8 gives whole numbers and x_scales. y is of the type of x, or float32 for an I8 x.
  Problem(Weight weight, Element x_element, Shape shape, Random& random, bool integers, int64_t group_size = 0);

  int64_t column(int64_t n, int64_t slot) const {
    const int64_t group = slot / (2 * unit);
    const int code = codes[n * (slots / (2 * unit)) + group];
    return (group * 4 + (slot / unit % 2 == 0 ? first_of(code) : second_of(code))) * unit + slot % unit;
  }

  // y [M, N] as doubles, after checking that nothing else was written.
  std::vector<double> run() const;

  // The row of x that the kernels see, and its scale: the rule of linear.h in plain floats.
  std::vector<double> seen(int64_t token, float& scale) const;

  // Checks y: exact up to the activation where the data are integers (and always where x is int8), else within the
  // bound.
  void check(const std::vector<double>& y, bool integers) const;

  std::string describe() const;
};

}  // namespace sparse24::test
