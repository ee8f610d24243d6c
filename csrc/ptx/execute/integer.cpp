// Integer arithmetic. Source: PTX ISA, "Integer Arithmetic Instructions".
//
// What the ISA leaves to the machine: a division by zero gives all ones, its remainder is the dividend; the least
// integer divided by -1 is itself, remainder 0.
#include <algorithm>
#include <limits>

#include "csrc/ptx/execute/family.h"
#include "csrc/ptx/execute/lanes.h"

namespace sparse24::ptx {
namespace {

// The type of twice the width, in which products are exact.
template <class T>
struct TwiceOf;
template <>
struct TwiceOf<uint16_t> {
  using type = uint32_t;
};
template <>
struct TwiceOf<int16_t> {
  using type = int32_t;
};
template <>
struct TwiceOf<uint32_t> {
  using type = uint64_t;
};
template <>
struct TwiceOf<int32_t> {
  using type = int64_t;
};
template <>
struct TwiceOf<uint64_t> {
  using type = unsigned __int128;
};
template <>
struct TwiceOf<int64_t> {
  using type = __int128;
};
template <class T>
using Twice = typename TwiceOf<T>::type;

template <class T>
constexpr int BITS = 8 * sizeof(T);

// The bits of `value`, for arithmetic that wraps.
template <class T>
Cell<T> bits(T value) {
  return static_cast<Cell<T>>(value);
}

template <class T>
Twice<T> product(T a, T b) {
  return static_cast<Twice<T>>(a) * static_cast<Twice<T>>(b);
}

int32_t saturate(int64_t value) {
  return static_cast<int32_t>(
      std::clamp<int64_t>(value, std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max()));
}

constexpr auto add = []<class T>(T a, T b) { return bits(a) + bits(b); };
constexpr auto sub = []<class T>(T a, T b) { return bits(a) - bits(b); };
constexpr auto add_sat = [](int32_t a, int32_t b) { return saturate(int64_t{a} + b); };
constexpr auto sub_sat = [](int32_t a, int32_t b) { return saturate(int64_t{a} - b); };

constexpr auto mul_lo = []<class T>(T a, T b) { return bits(a) * bits(b); };
constexpr auto mul_hi = []<class T>(T a, T b) { return product(a, b) >> BITS<T>; };
constexpr auto mul_wide = []<class T>(T a, T b) { return product(a, b); };
constexpr auto mad_lo = []<class T>(T a, T b, T c) { return bits(a) * bits(b) + bits(c); };
constexpr auto mad_hi = []<class T>(T a, T b, T c) { return bits(static_cast<T>(product(a, b) >> BITS<T>)) + bits(c); };
constexpr auto mad_wide = []<class T>(T a, T b, Twice<T> c) { return bits(product(a, b)) + bits(c); };
constexpr auto mad_hi_sat = [](int32_t a, int32_t b, int32_t c) { return saturate((product(a, b) >> 32) + c); };

// The low 24 bits, as a number of T's signedness.
template <class T>
int64_t low24(T value) {
  return static_cast<T>(static_cast<uint32_t>(value) << 8) >> 8;
}
constexpr auto mul24_lo = []<class T>(T a, T b) { return low24(a) * low24(b); };
constexpr auto mul24_hi = []<class T>(T a, T b) { return (low24(a) * low24(b)) >> 16; };
constexpr auto mad24_lo = []<class T>(T a, T b, T c) { return low24(a) * low24(b) + c; };
constexpr auto mad24_hi = []<class T>(T a, T b, T c) { return ((low24(a) * low24(b)) >> 16) + c; };
constexpr auto mad24_hi_sat = [](int32_t a, int32_t b, int32_t c) {
  return saturate(static_cast<int32_t>((low24(a) * low24(b)) >> 16) + int64_t{c});
};

constexpr auto sad = []<class T>(T a, T b, T c) { return bits(c) + (a < b ? bits(b) - bits(a) : bits(a) - bits(b)); };

constexpr auto quotient = []<class T>(T a, T b) -> Cell<T> {
  if (b == 0) return ~Cell<T>{0};
  if (std::is_signed_v<T> && b == static_cast<T>(-1)) return -bits(a);
  return bits(static_cast<T>(a / b));
};
constexpr auto remainder = []<class T>(T a, T b) -> Cell<T> {
  if (b == 0) return bits(a);
  if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
  return bits(static_cast<T>(a % b));
};

constexpr auto neg = []<class T>(T a) { return -bits(a); };
constexpr auto absolute = []<class T>(T a) { return a < 0 ? -bits(a) : bits(a); };
constexpr auto minimum = []<class T>(T a, T b) { return a < b ? a : b; };
constexpr auto maximum = []<class T>(T a, T b) { return a > b ? a : b; };
constexpr auto minimum_relu = []<class T>(T a, T b) { return std::max<T>(minimum(a, b), 0); };
constexpr auto maximum_relu = []<class T>(T a, T b) { return std::max<T>(maximum(a, b), 0); };

// F on each half of a word, of type T.
template <auto F, class T>
void halves(Warp& warp, const Operation& operation, uint32_t lanes) {
  constexpr auto both = [](uint32_t a, uint32_t b) {
    const auto low = static_cast<uint16_t>(F(static_cast<T>(a), static_cast<T>(b)));
    const auto high = static_cast<uint16_t>(F(static_cast<T>(a >> 16), static_cast<T>(b >> 16)));
    return low | (static_cast<uint32_t>(high) << 16);
  };
  lanewise<both, uint32_t, uint32_t, uint32_t>(warp, operation, lanes);
}

template <auto F, class... T>
bool choose_wide(Type type, Operation& operation, Types<T...>) {
  constexpr bool adds = std::is_same_v<decltype(F), decltype(mad_wide)>;
  const auto handler = []<class U>() -> Handler {
    if constexpr (adds) {
      return lanewise<F, Twice<U>, U, U, Twice<U>>;
    } else {
      return lanewise<F, Twice<U>, U, U>;
    }
  };
  return ((stands_for<T>(type) && (operation.run = handler.template operator()<T>())) || ...);
}

template <auto F>
bool widening(const Chosen& chosen, Operation& operation) {
  return choose_wide<F>(chosen.type(), operation, Types<uint16_t, uint32_t, int16_t, int32_t>());
}

// Sum of the products of N parts of `a`, of type A, with as many parts of `b`, of type B, from the FIRST on; plus c.
template <int N, class A, class B, int FIRST>
constexpr auto dot = [](uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < N; ++i) {
    const int32_t x = static_cast<A>(a >> (i * BITS<A>)), y = static_cast<B>(b >> ((FIRST + i) * BITS<B>));
    c += static_cast<uint32_t>(x * y);
  }
  return c;
};

template <int N, class UA, class SA, int FIRST>
bool dot_product(const Chosen& chosen, Operation& operation) {
  constexpr auto handler = []<class A, class B>() -> Handler {
    return lanewise<dot<N, A, B, FIRST>, uint32_t, uint32_t, uint32_t, uint32_t>;
  };
  const bool a = is_signed(chosen.type(0)), b = is_signed(chosen.type(1));
  operation.run = a ? (b ? handler.template operator()<SA, int8_t>() : handler.template operator()<SA, uint8_t>())
                    : (b ? handler.template operator()<UA, int8_t>() : handler.template operator()<UA, uint8_t>());
  return true;
}

template <auto F, int N>
constexpr auto of_s32 = always<uniform<F, int32_t, N>()>;

constexpr Form ARITHMETIC[] = {
    {"add", "u16|u32|u64|s16|s32|s64", "=0, 0, 0", by_width<add, 2>},
    {"add", "sat s32", "=0, 0, 0", of_s32<add_sat, 2>},
    {"add", "u16x2|s16x2", "=0, 0, 0", always<halves<add, uint16_t>>},
    {"sub", "u16|u32|u64|s16|s32|s64", "=0, 0, 0", by_width<sub, 2>},
    {"sub", "sat s32", "=0, 0, 0", of_s32<sub_sat, 2>},
    {"mul", "lo u16|u32|u64|s16|s32|s64", "=0, 0, 0", by_width<mul_lo, 2>},
    {"mul", "hi u16|u32|u64|s16|s32|s64", "=0, 0, 0", by_type<mul_hi, 2>},
    {"mul", "wide u16|u32|s16|s32", "=0w, 0, 0", widening<mul_wide>},
    {"mad", "lo u16|u32|u64|s16|s32|s64", "=0, 0, 0, 0", by_width<mad_lo, 3>},
    {"mad", "hi u16|u32|u64|s16|s32|s64", "=0, 0, 0, 0", by_type<mad_hi, 3>},
    {"mad", "wide u16|u32|s16|s32", "=0w, 0, 0, 0w", widening<mad_wide>},
    {"mad", "hi sat s32", "=0, 0, 0, 0", of_s32<mad_hi_sat, 3>},
    {"mul24", "lo u32|s32", "=0, 0, 0", by_type<mul24_lo, 2, Types<uint32_t, int32_t>>},
    {"mul24", "hi u32|s32", "=0, 0, 0", by_type<mul24_hi, 2, Types<uint32_t, int32_t>>},
    {"mad24", "lo u32|s32", "=0, 0, 0, 0", by_type<mad24_lo, 3, Types<uint32_t, int32_t>>},
    {"mad24", "hi u32|s32", "=0, 0, 0, 0", by_type<mad24_hi, 3, Types<uint32_t, int32_t>>},
    {"mad24", "hi sat s32", "=0, 0, 0, 0", of_s32<mad24_hi_sat, 3>},
    {"sad", "u16|u32|u64|s16|s32|s64", "=0, 0, 0, 0", by_type<sad, 3>},
    {"div", "u16|u32|u64|s16|s32|s64", "=0, 0, 0", by_type<quotient, 2>},
    {"rem", "u16|u32|u64|s16|s32|s64", "=0, 0, 0", by_type<remainder, 2>},
    {"abs", "s16|s32|s64", "=0, 0", by_type<absolute, 1>},
    {"neg", "s16|s32|s64", "=0, 0", by_type<neg, 1>},
    {"min", "u16|u32|u64|s16|s32|s64", "=0, 0, 0", by_type<minimum, 2>},
    {"min", "relu s32", "=0, 0, 0", of_s32<minimum_relu, 2>},
    {"min", "u16x2", "=0, 0, 0", always<halves<minimum, uint16_t>>},
    {"min", "s16x2", "=0, 0, 0", always<halves<minimum, int16_t>>},
    {"min", "relu s16x2", "=0, 0, 0", always<halves<minimum_relu, int16_t>>},
    {"max", "u16|u32|u64|s16|s32|s64", "=0, 0, 0", by_type<maximum, 2>},
    {"max", "relu s32", "=0, 0, 0", of_s32<maximum_relu, 2>},
    {"max", "u16x2", "=0, 0, 0", always<halves<maximum, uint16_t>>},
    {"max", "s16x2", "=0, 0, 0", always<halves<maximum, int16_t>>},
    {"max", "relu s16x2", "=0, 0, 0", always<halves<maximum_relu, int16_t>>},
    {"dp4a", "u32|s32 u32|s32", "=b32, b32, b32, b32", dot_product<4, uint8_t, int8_t, 0>},
    {"dp2a", "lo u32|s32 u32|s32", "=b32, b32, b32, b32", dot_product<2, uint16_t, int16_t, 0>},
    {"dp2a", "hi u32|s32 u32|s32", "=b32, b32, b32, b32", dot_product<2, uint16_t, int16_t, 2>},
};

}  // namespace

Forms integer_forms() {
  static const std::vector<Form> forms = join({ARITHMETIC, carry_forms()});
  return forms;
}

}  // namespace sparse24::ptx
