// Arithmetic on f32 and f64. Source: PTX ISA, "Floating Point Instructions", "Mixed Precision Floating Point
// Instructions".
//
// Results are rounded once, to nearest even unless the instruction says otherwise; subnormal numbers count unless .ftz
// flushes them, operands and results. div.full, div.approx, rcp.approx and sqrt.approx, whose errors the ISA bounds
// only, are rounded to nearest.
#include "csrc/ptx/execute/float.h"

#include <cmath>
#include <limits>

#include "csrc/ptx/execute/family.h"
#include "csrc/ptx/execute/lanes.h"
#include "csrc/ptx/numbers.h"

namespace sparse24::ptx {
namespace {

// The type in which sums, products and quotients of T can be compared with their rounded value.
template <class T>
struct WiderOf {
  using type = double;
};
template <>
struct WiderOf<double> {
#if defined(__SIZEOF_FLOAT128__)
  using type = __float128;
#else
  using type = long double;
  static_assert(std::numeric_limits<long double>::digits >= 106, "products of double have to be exact");
#endif
};
template <class T>
using Wider = typename WiderOf<T>::type;

// ---- the operations: to nearest even, and corrected for another rounding ----

// An exact sum of zero is -0 when rounding down, unless both terms are +0.
template <class T>
T corrected_sum(T nearest, const Exact<Wider<T>>& exact, bool both_positive, Rounding rounding) {
  if (exact.high == 0 && exact.low == 0 && rounding == Rounding::DOWN && !both_positive) return T{-0.0};
  return directed(nearest, exact, rounding);
}

struct Add {
  static constexpr int OPERANDS = 2;
  template <class T>
  static T nearest(T a, T b, T) {
    return a + b;
  }
  template <class T>
  static T corrected(T nearest, T a, T b, T, Rounding rounding) {
    if (!std::isfinite(a) || !std::isfinite(b)) return nearest;
    return corrected_sum(nearest, sum<Wider<T>>(a, b), !std::signbit(a) && !std::signbit(b), rounding);
  }
};

struct Sub {
  static constexpr int OPERANDS = 2;
  template <class T>
  static T nearest(T a, T b, T) {
    return a - b;
  }
  template <class T>
  static T corrected(T nearest, T a, T b, T, Rounding rounding) {
    return Add::corrected(nearest, a, -b, T{}, rounding);
  }
};

struct Mul {
  static constexpr int OPERANDS = 2;
  template <class T>
  static T nearest(T a, T b, T) {
    return a * b;
  }
  template <class T>
  static T corrected(T nearest, T a, T b, T, Rounding rounding) {
    if (!std::isfinite(a) || !std::isfinite(b)) return nearest;
    return directed(nearest, Exact<Wider<T>>{static_cast<Wider<T>>(a) * b, 0}, rounding);
  }
};

struct Fma {
  static constexpr int OPERANDS = 3;
  template <class T>
  static T nearest(T a, T b, T c) {
    return std::fma(a, b, c);
  }
  template <class T>
  static T corrected(T nearest, T a, T b, T c, Rounding rounding) {
    if (!std::isfinite(a) || !std::isfinite(b) || !std::isfinite(c)) return nearest;
    const bool both_positive = std::signbit(a) == std::signbit(b) && !std::signbit(c);
    return corrected_sum(nearest, sum<Wider<T>>(static_cast<Wider<T>>(a) * b, c), both_positive, rounding);
  }
};

// A quotient is never so near to a number of T, or to the middle of two, that its rounding to the wider type could hide
// on which side of it it lies: there it has no more than the wider type's digits, or is exact.
struct Div {
  static constexpr int OPERANDS = 2;
  template <class T>
  static T nearest(T a, T b, T) {
    return a / b;
  }
  template <class T>
  static T corrected(T nearest, T a, T b, T, Rounding rounding) {
    if (!std::isfinite(a) || !std::isfinite(b) || b == 0) return nearest;
    return directed(nearest, Exact<Wider<T>>{static_cast<Wider<T>>(a) / b, 0}, rounding);
  }
};

// PTX ISA, div.approx: a * (1/b), where the reciprocal of what is greater than 2^126 counts as 0.
struct ApproximateDiv : Div {
  static float nearest(float a, float b, float) {
    return std::fabs(b) > 0x1p126f && std::isfinite(b) ? a * std::copysign(0.0f, b) : a / b;
  }
};

struct Rcp {
  static constexpr int OPERANDS = 1;
  template <class T>
  static T nearest(T a, T, T) {
    return T{1} / a;
  }
  template <class T>
  static T corrected(T nearest, T a, T, T, Rounding rounding) {
    return Div::corrected(nearest, T{1}, a, T{}, rounding);
  }
};

struct Sqrt {
  static constexpr int OPERANDS = 1;
  template <class T>
  static T nearest(T a, T, T) {
    return std::sqrt(a);
  }
  template <class T>
  static T corrected(T nearest, T a, T, T, Rounding rounding) {
    if (!std::isfinite(nearest) || nearest == 0) return nearest;
    // The root lies above or below `nearest` as a lies above or below its square, which is exact.
    const Wider<T> excess = static_cast<Wider<T>>(a) - static_cast<Wider<T>>(nearest) * nearest;
    const bool up = rounding == Rounding::UP;
    if (excess < 0 && !up) return std::nextafter(nearest, T{0});
    if (excess > 0 && up) return std::nextafter(nearest, std::numeric_limits<T>::infinity());
    return nearest;
  }
};

// ---- handlers; PARTS values of T in a lane: 2 for f32x2 ----

enum Option { ROUNDING, FLUSH, SATURATE };  // indices of Operation::option

template <class T, class F>
struct Sources {
  const T* operand[3];
  Sources(Warp& warp, const Operation& operation) {
    for (int i = 0; i < 3; ++i) operand[i] = warp.lanes<T>(operation.slot[i < F::OPERANDS ? 1 + i : 1]);
  }
};

template <class F, class T, int PARTS>
void general(Warp& warp, const Operation& operation, uint32_t lanes) {
  T* const d = warp.lanes<T>(operation.slot[0]);
  const Sources<T, F> s(warp, operation);
  const auto rounding = static_cast<Rounding>(operation.option[ROUNDING]);
  const bool ftz = operation.option[FLUSH], sat = operation.option[SATURATE];
  each(lanes, [&](int lane) {
    for (int i = PARTS * lane; i < PARTS * (lane + 1); ++i) {
      T value[3];
      for (int k = 0; k < 3; ++k) value[k] = ftz ? flushed(s.operand[k][i]) : s.operand[k][i];
      T result = F::nearest(value[0], value[1], value[2]);
      if (rounding != Rounding::NEAREST_EVEN) result = F::corrected(result, value[0], value[1], value[2], rounding);
      if (ftz) result = flushed(result);
      d[i] = sat ? saturated(result) : canonical(result);
    }
  });
}

// The common case, to nearest: a plain loop.
template <class F, class T, bool FTZ>
void nearest(Warp& warp, const Operation& operation, uint32_t lanes) {
  T* const d = warp.lanes<T>(operation.slot[0]);
  const Sources<T, F> s(warp, operation);
  const T *const a = s.operand[0], *const b = s.operand[1], *const c = s.operand[2];
  each_alone(lanes, [&](int lane) {
    if constexpr (FTZ) {
      d[lane] = canonical(flushed(F::nearest(flushed(a[lane]), flushed(b[lane]), flushed(c[lane]))));
    } else {
      d[lane] = canonical(F::nearest(a[lane], b[lane], c[lane]));
    }
  });
}

#if defined(__x86_64__)
// Without these instructions std::fma is a call of the library for each lane.
template <class T, bool FTZ>
__attribute__((target("avx2,fma"))) void nearest_fma_avx2(Warp& warp, const Operation& operation, uint32_t lanes) {
  T* const d = warp.lanes<T>(operation.slot[0]);
  const Sources<T, Fma> s(warp, operation);
  const T *const a = s.operand[0], *const b = s.operand[1], *const c = s.operand[2];
  alignas(64) T result[LANES];
  for (int lane = 0; lane < LANES; ++lane) {
    if constexpr (FTZ) {
      result[lane] = canonical(flushed(__builtin_fmaf(flushed(a[lane]), flushed(b[lane]), flushed(c[lane]))));
    } else if constexpr (sizeof(T) == 4) {
      result[lane] = canonical(__builtin_fmaf(a[lane], b[lane], c[lane]));
    } else {
      result[lane] = __builtin_fma(a[lane], b[lane], c[lane]);
    }
  }
  for (int lane = 0; lane < LANES; ++lane) {
    d[lane] = (lanes & LANE_BIT[static_cast<size_t>(lane)]) != 0 ? result[lane] : d[lane];
  }
}
#endif

template <class F, class T, bool FTZ>
Handler nearest_handler() {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<F, Fma>) {
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return nearest_fma_avx2<T, FTZ>;
  }
#endif
  return nearest<F, T, FTZ>;
}

template <class F>
bool choose(const Chosen& chosen, Operation& operation) {
  operation.option[ROUNDING] = static_cast<uint8_t>(rounding_of(chosen));
  operation.option[FLUSH] = chosen.has("ftz");
  operation.option[SATURATE] = chosen.has("sat");
  const bool common = operation.option[ROUNDING] == 0 && operation.option[SATURATE] == 0;
  if (chosen.has("f32x2")) {
    operation.run = general<F, float, 2>;
  } else if (chosen.type() == Type::F64) {
    operation.run = common ? nearest_handler<F, double, false>() : general<F, double, 1>;
  } else if (common) {
    operation.run = chosen.has("ftz") ? nearest_handler<F, float, true>() : nearest_handler<F, float, false>();
  } else {
    operation.run = general<F, float, 1>;
  }
  return true;
}

bool choose_approximate_div(const Chosen& chosen, Operation& operation) {
  operation.run = chosen.has("ftz") ? nearest<ApproximateDiv, float, true> : nearest<ApproximateDiv, float, false>;
  return true;
}

// ---- mixed precision: a (and b) of f16 or bf16, c and the result f32 ----

// c stands last; the operands before are widened. Operation::option as above.
template <class F, bool BRAIN>
void mixed(Warp& warp, const Operation& operation, uint32_t lanes) {
  float* const d = warp.lanes<float>(operation.slot[0]);
  const uint32_t *const a = warp.lanes<uint32_t>(operation.slot[1]), *const b = warp.lanes<uint32_t>(operation.slot[2]);
  const float* const c = warp.lanes<float>(operation.slot[F::OPERANDS]);
  const auto rounding = static_cast<Rounding>(operation.option[ROUNDING]);
  const bool sat = operation.option[SATURATE];
  const auto widened = [](uint32_t half) {
    return BRAIN ? bfloat16_to_float(half & 0xffff) : half_to_float(half & 0xffff);
  };
  each(lanes, [&](int lane) {
    const float x = widened(a[lane]), y = F::OPERANDS == 3 ? widened(b[lane]) : c[lane], z = c[lane];
    float result = F::nearest(x, y, z);
    if (rounding != Rounding::NEAREST_EVEN) result = F::corrected(result, x, y, z, rounding);
    d[lane] = sat ? saturated(result) : canonical(result);
  });
}

template <class F>
bool choose_mixed(const Chosen& chosen, Operation& operation) {
  if (chosen.type() != Type::F32) return false;
  operation.option[ROUNDING] = static_cast<uint8_t>(rounding_of(chosen));
  operation.option[SATURATE] = chosen.has("sat");
  operation.run = chosen.type(1) == Type::BF16 ? mixed<F, true> : mixed<F, false>;
  return true;
}

const Form FORMS[] = {
    {"add", "rn|rz|rm|rp? ftz? sat? f32", "=0, 0, 0", choose<Add>},
    {"add", "rn|rz|rm|rp? f64", "=0, 0, 0", choose<Add>},
    {"add", "rn|rz|rm|rp? ftz? f32x2", "=b64, b64, b64", choose<Add>},
    {"add", "rn|rz|rm|rp? sat? f32 f16|bf16", "=0, 1, 0", choose_mixed<Add>},
    {"sub", "rn|rz|rm|rp? ftz? sat? f32", "=0, 0, 0", choose<Sub>},
    {"sub", "rn|rz|rm|rp? f64", "=0, 0, 0", choose<Sub>},
    {"sub", "rn|rz|rm|rp? ftz? f32x2", "=b64, b64, b64", choose<Sub>},
    {"sub", "rn|rz|rm|rp? sat? f32 f16|bf16", "=0, 1, 0", choose_mixed<Sub>},
    {"mul", "rn|rz|rm|rp? ftz? sat? f32", "=0, 0, 0", choose<Mul>},
    {"mul", "rn|rz|rm|rp? f64", "=0, 0, 0", choose<Mul>},
    {"mul", "rn|rz|rm|rp? ftz? f32x2", "=b64, b64, b64", choose<Mul>},
    {"fma", "rn|rz|rm|rp ftz? sat? f32", "=0, 0, 0, 0", choose<Fma>},
    {"fma", "rn|rz|rm|rp f64", "=0, 0, 0, 0", choose<Fma>},
    {"fma", "rn|rz|rm|rp ftz? f32x2", "=b64, b64, b64, b64", choose<Fma>},
    {"fma", "rn|rz|rm|rp sat? f32 f16|bf16", "=0, 1, 1, 0", choose_mixed<Fma>},
    {"mad", "rn|rz|rm|rp ftz? sat? f32", "=0, 0, 0, 0", choose<Fma>},
    {"mad", "rn|rz|rm|rp f64", "=0, 0, 0, 0", choose<Fma>},
    {"div", "rn|rz|rm|rp|full ftz? f32", "=0, 0, 0", choose<Div>},
    {"div", "approx ftz? f32", "=0, 0, 0", choose_approximate_div},
    {"div", "rn|rz|rm|rp f64", "=0, 0, 0", choose<Div>},
    {"rcp", "rn|rz|rm|rp|approx ftz? f32", "=0, 0", choose<Rcp>},
    {"rcp", "rn|rz|rm|rp f64", "=0, 0", choose<Rcp>},
    {"sqrt", "rn|rz|rm|rp|approx ftz? f32", "=0, 0", choose<Sqrt>},
    {"sqrt", "rn|rz|rm|rp f64", "=0, 0", choose<Sqrt>},
};

}  // namespace

Forms float_forms() {
  static const std::vector<Form> forms = join({FORMS, sign_forms(), approximation_forms()});
  return forms;
}

}  // namespace sparse24::ptx
