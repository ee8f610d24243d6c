// Minimum, maximum, signs and tests of f32 and f64. Source: PTX ISA, "Floating Point Instructions".
#include <cmath>

#include "csrc/ptx/execute/float.h"
#include "csrc/ptx/execute/lanes.h"

namespace sparse24::ptx {
namespace {

// ---- abs, neg, copysign ----

// The ISA leaves open which NaN abs.f32 and neg give; abs.f64 passes a NaN through unchanged.
template <class T>
constexpr auto absolute = [](T a) {
  if constexpr (sizeof(T) == 8) return a != a ? a : std::fabs(a);
  return canonical(std::fabs(a));
};
template <class T>
constexpr auto negated = [](T a) { return canonical(-a); };
constexpr auto absolute_flushed = [](float a) { return absolute<float>(flushed(a)); };
constexpr auto negated_flushed = [](float a) { return negated<float>(flushed(a)); };

template <auto SINGLE_F, auto FLUSHED_F, auto TWICE_F>
bool choose_sign(const Chosen& chosen, Operation& operation) {
  operation.run = chosen.type() == Type::F64 ? lanewise<TWICE_F, double, double>
                  : chosen.has("ftz")        ? lanewise<FLUSHED_F, float, float>
                                             : lanewise<SINGLE_F, float, float>;
  return true;
}
constexpr auto choose_abs = choose_sign<absolute<float>, absolute_flushed, absolute<double>>;
constexpr auto choose_neg = choose_sign<negated<float>, negated_flushed, negated<double>>;

// The sign of the first operand, all else of the second.
constexpr auto copysign_single = [](uint32_t a, uint32_t b) { return (a & 0x80000000) | (b & 0x7fffffff); };
constexpr auto copysign_twice = [](uint64_t a, uint64_t b) {
  constexpr uint64_t SIGN = uint64_t{1} << 63;
  return (a & SIGN) | (b & ~SIGN);
};
bool choose_copysign(const Chosen& chosen, Operation& operation) {
  operation.run =
      chosen.type() == Type::F32 ? uniform<copysign_single, uint32_t, 2>() : uniform<copysign_twice, uint64_t, 2>();
  return true;
}

// ---- min, max ----

template <bool MAXIMUM, class T>
constexpr auto plain_extremum = [](T a, T b) { return canonical(extremum_of(a, b, MAXIMUM, false)); };

// Operation::option: .ftz, .NaN, .abs, .xorsign.
template <bool MAXIMUM, int OPERANDS>
void extremum(Warp& warp, const Operation& operation, uint32_t lanes) {
  float* const d = warp.lanes<float>(operation.slot[0]);
  const float *const a = warp.lanes<float>(operation.slot[1]), *const b = warp.lanes<float>(operation.slot[2]),
                     *const c = warp.lanes<float>(operation.slot[OPERANDS]);
  const bool ftz = operation.option[0];
  const ExtremumMode mode{MAXIMUM, ftz, operation.option[1] != 0, operation.option[2] != 0, operation.option[3] != 0};
  const auto read = [&](float value) { return ftz ? flushed(value) : value; };
  each(lanes, [&](int lane) {
    const float x = read(a[lane]), y = read(b[lane]);
    d[lane] = canonical(OPERANDS == 3 ? extremum_of(mode, x, y, read(c[lane])) : extremum_of(mode, x, y));
  });
}

template <bool MAXIMUM>
bool choose_extremum(const Chosen& chosen, Operation& operation) {
  int i = 0;
  bool plain = true;
  for (const std::string_view modifier : {"ftz", "NaN", "abs", "xorsign"}) {
    operation.option[i++] = chosen.has(modifier);
    plain = plain && !chosen.has(modifier);
  }
  operation.run = chosen.type() == Type::F64 ? uniform<plain_extremum<MAXIMUM, double>, double, 2>()
                  : plain                    ? uniform<plain_extremum<MAXIMUM, float>, float, 2>()
                                             : extremum<MAXIMUM, 2>;
  return true;
}
template <bool MAXIMUM>
bool choose_extremum_of_three(const Chosen& chosen, Operation& operation) {
  choose_extremum<MAXIMUM>(chosen, operation);
  operation.run = extremum<MAXIMUM, 3>;
  return true;
}

// ---- testp ----

template <class T, class Test>
void test(Warp& warp, const Operation& operation, uint32_t lanes, Test&& holds) {
  const T* const a = warp.lanes<T>(operation.slot[1]);
  write_predicate(warp, operation.slot[0], lanes, lanes_where(lanes, [&](int lane) { return holds(a[lane]); }));
}

template <class T, int TEST>
void testp(Warp& warp, const Operation& operation, uint32_t lanes) {
  test<T>(warp, operation, lanes, [](T value) {
    const int kind = std::fpclassify(value);
    switch (TEST) {
      case 0:
        return kind != FP_INFINITE && kind != FP_NAN;
      case 1:
        return kind == FP_INFINITE;
      case 2:
        return kind != FP_NAN;
      case 3:
        return kind == FP_NAN;
      case 4:
        return kind == FP_NORMAL || kind == FP_ZERO;  // PTX ISA, testp: zeros are normal numbers
      default:
        return kind == FP_SUBNORMAL;
    }
  });
}

template <class T>
Handler test_numbered(int number) {
  static constexpr Handler TESTS[] = {testp<T, 0>, testp<T, 1>, testp<T, 2>, testp<T, 3>, testp<T, 4>, testp<T, 5>};
  return TESTS[number];
}
bool choose_testp(const Chosen& chosen, Operation& operation) {
  const int number = chosen.one_of({"finite", "infinite", "number", "notanumber", "normal", "subnormal"}, 0);
  operation.run = chosen.type() == Type::F32 ? test_numbered<float>(number) : test_numbered<double>(number);
  return true;
}

const Form FORMS[] = {
    {"abs", "ftz? f32", "=0, 0", choose_abs},
    {"abs", "f64", "=0, 0", choose_abs},
    {"neg", "ftz? f32", "=0, 0", choose_neg},
    {"neg", "f64", "=0, 0", choose_neg},
    {"copysign", "f32|f64", "=0, 0, 0", choose_copysign},
    {"min", "ftz? NaN? f32", "=0, 0, 0", choose_extremum<false>},
    {"min", "ftz? NaN? xorsign abs f32", "=0, 0, 0", choose_extremum<false>},
    {"min", "ftz? NaN? abs? f32", "=0, 0, 0, 0", choose_extremum_of_three<false>},
    {"min", "f64", "=0, 0, 0", choose_extremum<false>},
    {"max", "ftz? NaN? f32", "=0, 0, 0", choose_extremum<true>},
    {"max", "ftz? NaN? xorsign abs f32", "=0, 0, 0", choose_extremum<true>},
    {"max", "ftz? NaN? abs? f32", "=0, 0, 0, 0", choose_extremum_of_three<true>},
    {"max", "f64", "=0, 0, 0", choose_extremum<true>},
    {"testp", "finite|infinite|number|notanumber|normal|subnormal f32|f64", "=p, 0", choose_testp},
};

}  // namespace

Forms sign_forms() { return FORMS; }

}  // namespace sparse24::ptx
