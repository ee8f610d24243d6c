// Handlers made of functions of plain values: lanewise<f, D, A, B> is the handler of d = f(a, b), lane by lane, and the
// choose() functions of rows that need no more than that.
#pragma once
#include <array>
#include <bit>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#include "csrc/ptx/isa.h"
#include "csrc/ptx/machine.h"

namespace sparse24::ptx {

// What a lane of a slot holds of a T; see Slot. Also the type in which arithmetic on T wraps without undefined
// overflow.
template <class T>
using Cell = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

template <class T>
T from_cell(Cell<T> cell) {
  if constexpr (sizeof(T) < 4) {
    return static_cast<T>(cell);
  } else {
    return std::bit_cast<T>(cell);
  }
}

template <class T>
Cell<T> to_cell(T value) {
  if constexpr (sizeof(T) < 4) {
    return static_cast<std::make_unsigned_t<T>>(value);
  } else {
    return std::bit_cast<Cell<T>>(value);
  }
}

// Like each(), for bodies in which no lane reads what another writes. The slots of one operation are the same or apart,
// so the compiler need not check whether they overlap.
template <class Body>
inline void each_alone(uint32_t lanes, Body&& body) {
  if (lanes == ~0u) {
#pragma GCC ivdep
    for (int lane = 0; lane < LANES; ++lane) body(lane);
  } else {
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) body(__builtin_ctz(rest));
  }
}

// Bit `lane` of a mask, from memory: so compilers vectorise what packs and unpacks predicates.
inline constexpr auto LANE_BIT = [] {
  std::array<uint32_t, LANES> bits{};
  for (int lane = 0; lane < LANES; ++lane) bits[static_cast<size_t>(lane)] = 1u << lane;
  return bits;
}();

// The lanes for which `test(lane)` holds, as a mask.
template <class Test>
uint32_t lanes_where(uint32_t lanes, Test&& test) {
  uint32_t result = 0;
  each(lanes, [&](int lane) { result |= test(lane) ? LANE_BIT[static_cast<size_t>(lane)] : 0; });
  return result;
}

inline void write_predicate(Warp& warp, Slot slot, uint32_t lanes, uint32_t value) {
  if (slot == NO_SLOT) return;
  uint32_t& predicate = warp.predicate(slot);
  predicate = (predicate & ~lanes) | (value & lanes);
}

// d = F(s...), cut to D: slot 0 of type D, the next ones of the types S.
template <auto F, class D, class... S>
void lanewise(Warp& warp, const Operation& operation, uint32_t lanes) {
  Cell<D>* const d = warp.lanes<Cell<D>>(operation.slot[0]);
  [&]<size_t... I>(std::index_sequence<I...>) {
    const std::tuple<const Cell<S>*...> s{warp.lanes<Cell<S>>(operation.slot[1 + I])...};
    each_alone(lanes,
               [&](int lane) { d[lane] = to_cell<D>(static_cast<D>(F(from_cell<S>(std::get<I>(s)[lane])...))); });
  }(std::index_sequence_for<S...>());
}

// The handler of d = F(s...) with N operands, all of type T.
template <auto F, class T, int N>
constexpr Handler uniform() {
  if constexpr (N == 1) {
    return lanewise<F, T, T>;
  } else if constexpr (N == 2) {
    return lanewise<F, T, T, T>;
  } else {
    static_assert(N == 3);
    return lanewise<F, T, T, T, T>;
  }
}

template <class... T>
struct Types {};
using Integers = Types<uint16_t, uint32_t, uint64_t, int16_t, int32_t, int64_t>;
using Words = Types<uint16_t, uint32_t, uint64_t>;

// Whether a C++ type stands for a PTX type: same width, same signedness; floating-point and bit types are unsigned
// words.
template <class T>
bool stands_for(Type type) {
  return bits_of(type) == static_cast<int>(8 * sizeof(T)) && is_signed(type) == std::is_signed_v<T>;
}

// ---- choose() functions of Form rows ----

template <Handler HANDLER>
bool always(const Chosen&, Operation& operation) {
  operation.run = HANDLER;
  return true;
}

template <auto F, int N, class... T>
bool choose_uniform(Type type, Operation& operation, Types<T...>) {
  return ((stands_for<T>(type) && (operation.run = uniform<F, T, N>())) || ...);
}

// d = F(s...) with N operands, all of the instruction's type.
template <auto F, int N, class List = Integers>
bool by_type(const Chosen& chosen, Operation& operation) {
  return choose_uniform<F, N>(chosen.type(), operation, List());
}

// The same where signedness makes no difference: all types of a width share a handler.
template <auto F, int N>
bool by_width(const Chosen& chosen, Operation& operation) {
  switch (bits_of(chosen.type())) {
    case 16:
      operation.run = uniform<F, uint16_t, N>();
      return true;
    case 32:
      operation.run = uniform<F, uint32_t, N>();
      return true;
    case 64:
      operation.run = uniform<F, uint64_t, N>();
      return true;
    default:
      return false;
  }
}

}  // namespace sparse24::ptx
