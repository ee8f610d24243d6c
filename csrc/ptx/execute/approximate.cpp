// The approximations: ex2, lg2, sin, cos, tanh, rsqrt, and rcp of f64. Source: PTX ISA, the tables of their errors and
// special values.
//
// They are computed in double and rounded to nearest: within the ISA's bounds, which are 2 ulp for ex2.f32, 2^-22 for
// lg2, 2^-20.5 for sin and cos within two turns, 2^-22.9 for rsqrt.f32, 2^-11 for tanh.f32; 2^-9.9 and 2^-7 for ex2 of
// f16 and bf16, 2^-10.987 and 2^-8 for tanh. The bit patterns that hardware gives are its own and not modelled.
#include <cmath>
#include <limits>

#include "csrc/ptx/execute/float.h"
#include "csrc/ptx/execute/lanes.h"
#include "csrc/ptx/numbers.h"

namespace sparse24::ptx {
namespace {

double ex2(double x) { return std::exp2(x); }
double lg2(double x) { return std::log2(x); }
double sine(double x) { return std::sin(x); }
double cosine(double x) { return std::cos(x); }
double hyperbolic_tangent(double x) { return std::tanh(x); }
double rsqrt(double x) { return 1 / std::sqrt(x); }  // the root of -0 is -0
double rcp(double x) { return 1 / x; }

template <double (*F)(double), bool FTZ>
constexpr auto single = [](float a) {
  const float result = static_cast<float>(F(FTZ ? flushed(a) : a));
  return canonical(FTZ ? flushed(result) : result);
};

// PTX ISA, rcp.approx.ftz.f64, rsqrt.approx.ftz.f64: the upper 32 bits of the operand count, and the lower ones of the
// result are zeros.
template <double (*F)(double)>
constexpr auto upper_half = [](double a) {
  constexpr uint64_t UPPER = 0xffffffff00000000;
  const auto flush = [](double x) {
    return std::fabs(x) < std::numeric_limits<double>::min() ? std::copysign(0.0, x) : x;
  };
  const double result = flush(F(flush(std::bit_cast<double>(std::bit_cast<uint64_t>(a) & UPPER))));
  return std::bit_cast<double>(result != result ? uint64_t{0x7fffffff00000000}
                                                : std::bit_cast<uint64_t>(result) & UPPER);
};
constexpr auto rsqrt_twice = [](double a) { return rsqrt(a); };

uint32_t narrow(double x, const Format& format) { return encode(x, format, Rounding::NEAREST_EVEN); }

template <double (*F)(double)>
constexpr auto half = [](uint32_t a) { return narrow(F(half_to_float(a & 0xffff)), HALF); };

// Operation::option[0] of bf16: .ftz, which only ex2 has.
template <double (*F)(double), bool FTZ>
constexpr auto brain = [](uint32_t a) {
  const double x = bfloat16_to_float(a & 0xffff);
  const uint32_t code = narrow(F(FTZ ? flushed(x) : x), BFLOAT16);
  return FTZ && (code & 0x7f80) == 0 ? code & 0x8000 : code;
};

template <auto ONE>
constexpr auto pair = [](uint32_t a) { return ONE(a & 0xffff) | ONE(a >> 16) << 16; };

template <double (*F)(double)>
bool choose(const Chosen& chosen, Operation& operation) {
  const bool ftz = chosen.has("ftz");
  switch (chosen.type()) {
    case Type::F32:
      operation.run = ftz ? uniform<single<F, true>, float, 1>() : uniform<single<F, false>, float, 1>();
      return true;
    case Type::F16:
      operation.run = uniform<half<F>, uint32_t, 1>();
      return true;
    case Type::F16X2:
      operation.run = uniform<pair<half<F>>, uint32_t, 1>();
      return true;
    case Type::BF16:
      operation.run = ftz ? uniform<brain<F, true>, uint32_t, 1>() : uniform<brain<F, false>, uint32_t, 1>();
      return true;
    case Type::BF16X2:
      operation.run =
          ftz ? uniform<pair<brain<F, true>>, uint32_t, 1>() : uniform<pair<brain<F, false>>, uint32_t, 1>();
      return true;
    default:
      return false;
  }
}

const Form FORMS[] = {
    {"rcp", "approx ftz f64", "=0, 0", always<uniform<upper_half<rcp>, double, 1>()>},
    {"rsqrt", "approx ftz? f32", "=0, 0", choose<rsqrt>},
    {"rsqrt", "approx f64", "=0, 0", always<uniform<rsqrt_twice, double, 1>()>},
    {"rsqrt", "approx ftz f64", "=0, 0", always<uniform<upper_half<rsqrt>, double, 1>()>},
    {"ex2", "approx ftz? f32", "=0, 0", choose<ex2>},
    {"ex2", "approx f16|f16x2", "=0, 0", choose<ex2>},
    {"ex2", "approx ftz bf16|bf16x2", "=0, 0", choose<ex2>},
    {"lg2", "approx ftz? f32", "=0, 0", choose<lg2>},
    {"sin", "approx ftz? f32", "=0, 0", choose<sine>},
    {"cos", "approx ftz? f32", "=0, 0", choose<cosine>},
    {"tanh", "approx f32|f16|f16x2|bf16|bf16x2", "=0, 0", choose<hyperbolic_tangent>},
};

}  // namespace

Forms approximation_forms() { return FORMS; }

}  // namespace sparse24::ptx
