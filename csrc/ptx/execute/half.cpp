// Arithmetic on f16, bf16 and their pairs. Source: PTX ISA, "Half Precision Floating Point Instructions".
//
// A result is rounded once, to nearest even. Sums and products are taken in float: its 24 digits are more than twice
// those of the operands and two, so rounding a second time changes nothing (Figueroa, 1995). That does not hold for
// fma, which is rounded to odd in between. A NaN result is 0x7fff; neg and abs, of which the ISA leaves it open, change
// the sign bit only.
#include <cmath>

#include "csrc/ptx/execute/float.h"
#include "csrc/ptx/execute/lanes.h"
#include "csrc/ptx/numbers.h"

namespace sparse24::ptx {
namespace {

struct Half {
  static constexpr uint32_t EXPONENT = 0x7c00;
  static float read(uint32_t code) { return half_to_float(code); }
  static uint32_t write(float value) { return float_to_half(value); }
};
struct Brain {
  static constexpr uint32_t EXPONENT = 0x7f80;
  static float read(uint32_t code) { return bfloat16_to_float(code); }
  static uint32_t write(float value) { return float_to_bfloat16(value); }
};

template <class Kind>
uint32_t flushed_code(uint32_t code) {
  return (code & Kind::EXPONENT) == 0 ? code & 0x8000 : code;
}

enum Flag : uint8_t { FTZ = 1, SAT = 2, RELU = 4, NOT_A_NUMBER = 8, XORSIGN_ABS = 16 };

uint8_t flags_of(const Chosen& chosen) {
  return static_cast<uint8_t>((chosen.has("ftz") ? FTZ : 0) | (chosen.has("sat") ? SAT : 0) |
                              (chosen.has("relu") ? RELU : 0) | (chosen.has("NaN") ? NOT_A_NUMBER : 0) |
                              (chosen.has("xorsign") ? XORSIGN_ABS : 0));
}

// ---- the operations: a float that rounds as the exact result does ----

struct Add {
  static constexpr int OPERANDS = 2;
  static float of(float a, float b, float, uint8_t) { return a + b; }
};
struct Sub {
  static constexpr int OPERANDS = 2;
  static float of(float a, float b, float, uint8_t) { return a - b; }
};
struct Mul {
  static constexpr int OPERANDS = 2;
  static float of(float a, float b, float, uint8_t) { return a * b; }
};
struct Fma {
  static constexpr int OPERANDS = 3;
  static float of(float a, float b, float c, uint8_t) {
    return to_odd_float(to_odd(sum<double>(static_cast<double>(a) * b, c)));
  }
};
template <bool MAXIMUM>
struct Extremum {
  static constexpr int OPERANDS = 2;
  static float of(float a, float b, float, uint8_t flags) {
    if ((flags & XORSIGN_ABS) == 0) return extremum_of(a, b, MAXIMUM, (flags & NOT_A_NUMBER) != 0);
    return extremum_of(ExtremumMode{MAXIMUM, false, (flags & NOT_A_NUMBER) != 0, true, true}, a, b);
  }
};

template <class F, class Kind>
uint32_t apply(uint32_t a, uint32_t b, uint32_t c, uint8_t flags) {
  if ((flags & FTZ) != 0) a = flushed_code<Kind>(a), b = flushed_code<Kind>(b), c = flushed_code<Kind>(c);
  float value = F::of(Kind::read(a), Kind::read(b), Kind::read(c), flags);
  if ((flags & SAT) != 0) value = saturated(value);
  if ((flags & RELU) != 0) value = rectified(value);
  const uint32_t code = Kind::write(value);
  return (flags & FTZ) != 0 ? flushed_code<Kind>(code) : code;
}

// HALVES: 2 for pairs. PLAIN: without modifiers, a loop that compilers vectorise.
template <class F, class Kind, int HALVES, bool PLAIN>
void halves(Warp& warp, const Operation& operation, uint32_t lanes) {
  uint32_t* const d = warp.lanes<uint32_t>(operation.slot[0]);
  const uint32_t *const a = warp.lanes<uint32_t>(operation.slot[1]), *const b = warp.lanes<uint32_t>(operation.slot[2]),
                        *const c = warp.lanes<uint32_t>(operation.slot[F::OPERANDS]);
  const uint8_t flags = PLAIN ? 0 : operation.option[0];
  each_alone(lanes, [&](int lane) {
    const uint32_t low = apply<F, Kind>(a[lane] & 0xffff, b[lane] & 0xffff, c[lane] & 0xffff, flags);
    const uint32_t high = HALVES == 2 ? apply<F, Kind>(a[lane] >> 16, b[lane] >> 16, c[lane] >> 16, flags) : 0;
    d[lane] = low | high << 16;
  });
}

template <class F, bool PLAIN>
Handler handler_for(Type type) {
  switch (type) {
    case Type::F16:
      return halves<F, Half, 1, PLAIN>;
    case Type::F16X2:
      return halves<F, Half, 2, PLAIN>;
    case Type::BF16:
      return halves<F, Brain, 1, PLAIN>;
    default:
      return halves<F, Brain, 2, PLAIN>;
  }
}

template <class F>
bool choose(const Chosen& chosen, Operation& operation) {
  operation.option[0] = flags_of(chosen);
  const Type type = chosen.type();
  operation.run = operation.option[0] == 0 ? handler_for<F, true>(type) : handler_for<F, false>(type);
  return true;
}

// ---- neg, abs: on the bits; .ftz flushes before ----

// KEPT of the bits, and of those FLIPPED.
template <uint32_t KEPT, uint32_t FLIPPED>
constexpr auto sign_bits = [](uint32_t a) { return (a & KEPT) ^ FLIPPED; };
template <uint32_t KEPT, uint32_t FLIPPED>
constexpr auto flushed_sign_bits =
    [](uint32_t a) { return ((flushed_code<Half>(a & 0xffff) | flushed_code<Half>(a >> 16) << 16) & KEPT) ^ FLIPPED; };

template <uint32_t KEPT, uint32_t FLIPPED>
bool choose_sign(const Chosen& chosen, Operation& operation) {
  constexpr uint32_t LOW = 0xffff;
  const bool pair = bits_of(chosen.type()) == 32, ftz = chosen.has("ftz");
  operation.run = pair ? (ftz ? uniform<flushed_sign_bits<KEPT, FLIPPED>, uint32_t, 1>()
                              : uniform<sign_bits<KEPT, FLIPPED>, uint32_t, 1>())
                       : (ftz ? uniform<flushed_sign_bits<KEPT & LOW, FLIPPED & LOW>, uint32_t, 1>()
                              : uniform<sign_bits<KEPT & LOW, FLIPPED & LOW>, uint32_t, 1>());
  return true;
}
constexpr auto choose_neg = choose_sign<0xffffffff, 0x80008000>;
constexpr auto choose_abs = choose_sign<0x7fff7fff, 0>;

const Form FORMS[] = {
    {"add", "rn? ftz? sat? f16|f16x2", "=0, 0, 0", choose<Add>},
    {"add", "rn? bf16|bf16x2", "=0, 0, 0", choose<Add>},
    {"sub", "rn? ftz? sat? f16|f16x2", "=0, 0, 0", choose<Sub>},
    {"sub", "rn? bf16|bf16x2", "=0, 0, 0", choose<Sub>},
    {"mul", "rn? ftz? sat? f16|f16x2", "=0, 0, 0", choose<Mul>},
    {"mul", "rn? bf16|bf16x2", "=0, 0, 0", choose<Mul>},
    {"fma", "rn ftz? sat? f16|f16x2", "=0, 0, 0, 0", choose<Fma>},
    {"fma", "rn ftz? relu f16|f16x2", "=0, 0, 0, 0", choose<Fma>},
    {"fma", "rn relu? bf16|bf16x2", "=0, 0, 0, 0", choose<Fma>},
    {"neg", "ftz? f16|f16x2", "=0, 0", choose_neg},
    {"neg", "bf16|bf16x2", "=0, 0", choose_neg},
    {"abs", "ftz? f16|f16x2", "=0, 0", choose_abs},
    {"abs", "bf16|bf16x2", "=0, 0", choose_abs},
    {"min", "ftz? NaN? f16|f16x2", "=0, 0, 0", choose<Extremum<false>>},
    {"min", "ftz? NaN? xorsign abs f16|f16x2", "=0, 0, 0", choose<Extremum<false>>},
    {"min", "NaN? bf16|bf16x2", "=0, 0, 0", choose<Extremum<false>>},
    {"min", "NaN? xorsign abs bf16|bf16x2", "=0, 0, 0", choose<Extremum<false>>},
    {"max", "ftz? NaN? f16|f16x2", "=0, 0, 0", choose<Extremum<true>>},
    {"max", "ftz? NaN? xorsign abs f16|f16x2", "=0, 0, 0", choose<Extremum<true>>},
    {"max", "NaN? bf16|bf16x2", "=0, 0, 0", choose<Extremum<true>>},
    {"max", "NaN? xorsign abs bf16|bf16x2", "=0, 0, 0", choose<Extremum<true>>},
};

}  // namespace

Forms half_forms() { return FORMS; }

}  // namespace sparse24::ptx
