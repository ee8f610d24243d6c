// Extended-precision integer arithmetic: sums with a carry in and out, the flag CC.CF of each lane being a bit of
// Warp::carry. Source: PTX ISA, "Extended-Precision Integer Arithmetic Instructions".
#include "csrc/ptx/execute/family.h"
#include "csrc/ptx/execute/lanes.h"

namespace sparse24::ptx {
namespace {

enum Option { CARRY_IN, CARRY_OUT };  // indices of Operation::option

// What is added; T is unsigned.
template <class T>
struct Terms {
  T x, y;
};

// d = x + y + CC.CF, with {x, y} = TERMS(a, b, c). A difference is the sum with the complement, and its borrow the
// complement of the carry.
template <class T, auto TERMS, int N, bool BORROW>
void sum(Warp& warp, const Operation& operation, uint32_t lanes) {
  constexpr uint32_t inverted = BORROW ? ~0u : 0;
  const uint32_t carry_in = (operation.option[CARRY_IN] ? warp.carry : 0) ^ inverted;
  T* const d = warp.lanes<T>(operation.slot[0]);
  const T* const a = warp.lanes<T>(operation.slot[1]);
  const T* const b = warp.lanes<T>(operation.slot[2]);
  const T* const c = warp.lanes<T>(operation.slot[N]);
  uint32_t carry_out = 0;
  each(lanes, [&](int lane) {
    const auto [x, y] = TERMS(a[lane], b[lane], c[lane]);
    const T partial = x + y, total = partial + ((carry_in >> lane) & 1);
    d[lane] = total;
    carry_out |= static_cast<uint32_t>((partial < x) | (total < partial)) << lane;
  });
  if (operation.option[CARRY_OUT]) warp.carry = (warp.carry & ~lanes) | ((carry_out ^ inverted) & lanes);
}

constexpr auto added = []<class T>(T a, T b, T) { return Terms<T>{a, b}; };
constexpr auto subtracted = []<class T>(T a, T b, T) { return Terms<T>{a, static_cast<T>(~b)}; };
constexpr auto product_low = []<class T>(T a, T b, T c) { return Terms<T>{static_cast<T>(a * b), c}; };
template <bool SIGNED>
constexpr auto product_high = []<class T>(T a, T b, T c) {
  using Factor = std::conditional_t<SIGNED, std::make_signed_t<T>, T>;
  using Product = std::conditional_t<SIGNED, __int128, unsigned __int128>;
  const Product product = static_cast<Product>(static_cast<Factor>(a)) * static_cast<Factor>(b);
  return Terms<T>{static_cast<T>(product >> (8 * sizeof(T))), c};
};

template <auto TERMS, int N, bool BORROW>
void by_size(bool wide, Operation& operation) {
  operation.run = wide ? sum<uint64_t, TERMS, N, BORROW> : sum<uint32_t, TERMS, N, BORROW>;
}

// `addc` and `subc` read the flag, as `madc` does; `.cc` writes it.
template <bool IN, bool BORROW>
bool add_or_subtract(const Chosen& chosen, Operation& operation) {
  constexpr auto terms = [] {
    if constexpr (BORROW) {
      return subtracted;
    } else {
      return added;
    }
  }();
  by_size<terms, 2, BORROW>(bits_of(chosen.type()) == 64, operation);
  operation.option[CARRY_IN] = IN;
  operation.option[CARRY_OUT] = chosen.has("cc");
  return true;
}

template <bool IN>
bool multiply_add(const Chosen& chosen, Operation& operation) {
  const bool wide = bits_of(chosen.type()) == 64;
  if (chosen.has("lo")) {
    by_size<product_low, 3, false>(wide, operation);
  } else if (is_signed(chosen.type())) {
    by_size<product_high<true>, 3, false>(wide, operation);
  } else {
    by_size<product_high<false>, 3, false>(wide, operation);
  }
  operation.option[CARRY_IN] = IN;
  operation.option[CARRY_OUT] = chosen.has("cc");
  return true;
}

constexpr Form FORMS[] = {
    {"add", "cc u32|s32|u64|s64", "=0, 0, 0", add_or_subtract<false, false>},
    {"addc", "cc? u32|s32|u64|s64", "=0, 0, 0", add_or_subtract<true, false>},
    {"sub", "cc u32|s32|u64|s64", "=0, 0, 0", add_or_subtract<false, true>},
    {"subc", "cc? u32|s32|u64|s64", "=0, 0, 0", add_or_subtract<true, true>},
    {"mad", "hi|lo cc u32|s32|u64|s64", "=0, 0, 0, 0", multiply_add<false>},
    {"madc", "hi|lo cc? u32|s32|u64|s64", "=0, 0, 0, 0", multiply_add<true>},
};

}  // namespace

Forms carry_forms() { return FORMS; }

}  // namespace sparse24::ptx
