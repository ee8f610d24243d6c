// atom and red. Blocks run in several threads of the host: global memory is changed by compare and exchange. The lanes
// of a warp come one after another. Source: PTX ISA, "atom", "red".
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>

#include "csrc/ptx/execute/access.h"
#include "csrc/ptx/execute/memory_forms.h"
#include "csrc/ptx/numbers.h"

namespace sparse24::ptx {
namespace {

// ---- what is done to one element: apply(old, b, c, in global memory), T being its bits
// -------------------------------

template <class T>
struct Add {
  using Bits = T;
  static T apply(T old, T b, T, bool) { return old + b; }
};
template <class T, class Signed = T>
struct Min {
  using Bits = T;
  static T apply(T old, T b, T, bool) { return static_cast<Signed>(b) < static_cast<Signed>(old) ? b : old; }
};
template <class T, class Signed = T>
struct Max {
  using Bits = T;
  static T apply(T old, T b, T, bool) { return static_cast<Signed>(b) > static_cast<Signed>(old) ? b : old; }
};
struct Increment {
  using Bits = uint32_t;
  static uint32_t apply(uint32_t old, uint32_t b, uint32_t, bool) { return old >= b ? 0 : old + 1; }
};
struct Decrement {
  using Bits = uint32_t;
  static uint32_t apply(uint32_t old, uint32_t b, uint32_t, bool) { return old == 0 || old > b ? b : old - 1; }
};
template <class T>
struct And {
  using Bits = T;
  static T apply(T old, T b, T, bool) { return old & b; }
};
template <class T>
struct Or {
  using Bits = T;
  static T apply(T old, T b, T, bool) { return old | b; }
};
template <class T>
struct Xor {
  using Bits = T;
  static T apply(T old, T b, T, bool) { return old ^ b; }
};
template <class T>
struct Exchange {
  using Bits = T;
  static T apply(T, T b, T, bool) { return b; }
};
template <class T>
struct CompareAndSwap {
  using Bits = T;
  static T apply(T old, T b, T c, bool) { return old == b ? c : old; }
};

float flushed(float value) { return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value; }

struct AddF32 {
  using Bits = uint32_t;
  static uint32_t apply(uint32_t old, uint32_t b, uint32_t, bool global) {
    float x = std::bit_cast<float>(old), y = std::bit_cast<float>(b);
    // "Current implementation of atom.add.f32 on global memory flushes subnormal inputs and results".
    if (global) x = flushed(x), y = flushed(y);
    const float sum = global ? flushed(x + y) : x + y;
    return std::isnan(sum) ? 0x7fffffff : std::bit_cast<uint32_t>(sum);
  }
};
struct AddF64 {
  using Bits = uint64_t;
  static uint64_t apply(uint64_t old, uint64_t b, uint64_t, bool) {
    return std::bit_cast<uint64_t>(std::bit_cast<double>(old) + std::bit_cast<double>(b));
  }
};

// The sum of two 11-bit or 8-bit significands, rounded to float and then to their type, is rounded right: float has
// more than twice their bits and two to spare.
struct F16 {
  static float widen(uint16_t bits) { return half_to_float(bits); }
  static uint16_t narrow(float value) { return static_cast<uint16_t>(float_to_half(value)); }
};
struct BF16 {
  static float widen(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }
  static uint16_t narrow(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
  }
};
template <class Half>
struct AddHalf {
  using Bits = uint16_t;
  static uint16_t apply(uint16_t old, uint16_t b, uint16_t, bool) {
    const float sum = Half::widen(old) + Half::widen(b);
    return std::isnan(sum) ? 0x7fff : Half::narrow(sum);
  }
};
template <class Half>
struct AddPair {
  using Bits = uint32_t;
  static uint32_t apply(uint32_t old, uint32_t b, uint32_t, bool global) {
    const auto low = [](uint32_t x) { return static_cast<uint16_t>(x); };
    const auto high = [](uint32_t x) { return static_cast<uint16_t>(x >> 16); };
    return AddHalf<Half>::apply(low(old), low(b), 0, global) |
           uint32_t{AddHalf<Half>::apply(high(old), high(b), 0, global)} << 16;
  }
};

// ---- one lane
// --------------------------------------------------------------------------------------------------------

template <class Change>
typename Change::Bits change(uint8_t* host, typename Change::Bits b, typename Change::Bits c, bool global) {
  using T = typename Change::Bits;
  T old;
  if (!global) {
    std::memcpy(&old, host, sizeof old);
    const T now = Change::apply(old, b, c, false);
    std::memcpy(host, &now, sizeof now);
    return old;
  }
  if (reinterpret_cast<uintptr_t>(host) % sizeof(T) != 0) {
    // A buffer of the host that is less aligned than its device address: all its atomics come this way.
    static std::mutex unaligned;
    std::lock_guard lock(unaligned);
    std::memcpy(&old, host, sizeof old);
    const T now = Change::apply(old, b, c, true);
    std::memcpy(host, &now, sizeof now);
    return old;
  }
  std::atomic_ref<T> place(*reinterpret_cast<T*>(host));
  old = place.load(std::memory_order_relaxed);
  while (!place.compare_exchange_weak(old, Change::apply(old, b, c, true), std::memory_order_acq_rel,
                                      std::memory_order_relaxed)) {
  }
  return old;
}

// N elements, each atomic for itself. RESULT: atom, whose first N slots take the old values.
template <class Change, int N, bool RESULT>
void run(Warp& warp, const Operation& operation, uint32_t lanes) {
  using T = typename Change::Bits;
  using Cell = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  constexpr int ADDRESS = RESULT ? N : 0;
  Access access;
  access.size = sizeof(T) * N;
  access.intent = Intent::ATOMIC;
  access.strong = true;
  address_lanes(warp, operation, operation.slot[ADDRESS], 0, lanes, access);
  const uint32_t good = locate(warp, operation.space, lanes, access);
  const bool ordered = (operation.option[0] & ORDERED) != 0, device = (operation.option[0] & DEVICE) != 0;
  before_strong_write(warp, good, access, ordered, device);
  const bool compare = operation.option[1] != 0;
  in_turn(lanes, [&](uint32_t lane) {
    T old[N] = {};
    for (int i = 0; i < N && (good >> lane & 1) != 0; ++i) {
      const auto operand = [&](int at) { return static_cast<T>(warp.lanes<Cell>(operation.slot[at])[lane]); };
      const T c = compare ? operand(ADDRESS + 2) : T{0};
      old[i] = change<Change>(access.host[lane] + static_cast<size_t>(i) * sizeof(T), operand(ADDRESS + 1 + i), c,
                              (access.global >> lane & 1) != 0);
    }
    for (int i = 0; i < N && RESULT; ++i) {
      if (operation.slot[i] != NO_SLOT) warp.lanes<Cell>(operation.slot[i])[lane] = old[i];
    }
  });
  // "Reductions do not form acquire patterns."
  if (RESULT) after_strong_read(warp, good, access, device);
}

// ---- forms
// -----------------------------------------------------------------------------------------------------------

template <class Change, bool RESULT, int... COUNTS>
Handler counted(int count) {
  Handler handler = nullptr;
  ((count == COUNTS ? (handler = run<Change, COUNTS, RESULT>, 0) : 0), ...);
  return handler;
}

template <bool RESULT>
Handler integer_handler(const Chosen& chosen, Type type) {
  using enum Type;
  const auto by_width = [&]<template <class> class Change>() -> Handler {
    return bits_of(type) == 64 ? run<Change<uint64_t>, 1, RESULT> : run<Change<uint32_t>, 1, RESULT>;
  };
  const bool bits = type == B32 || type == B64;
  const bool number = type == U32 || type == S32 || type == U64 || type == S64;
  switch (chosen.one_of({"add", "min", "max", "inc", "dec", "and", "or", "xor", "exch", "cas"}, -1)) {
    case 0:
      return number ? by_width.template operator()<Add>() : nullptr;
    case 1:
      return type == U32   ? run<Min<uint32_t>, 1, RESULT>
             : type == S32 ? run<Min<uint32_t, int32_t>, 1, RESULT>
             : type == U64 ? run<Min<uint64_t>, 1, RESULT>
             : type == S64 ? run<Min<uint64_t, int64_t>, 1, RESULT>
                           : nullptr;
    case 2:
      return type == U32   ? run<Max<uint32_t>, 1, RESULT>
             : type == S32 ? run<Max<uint32_t, int32_t>, 1, RESULT>
             : type == U64 ? run<Max<uint64_t>, 1, RESULT>
             : type == S64 ? run<Max<uint64_t, int64_t>, 1, RESULT>
                           : nullptr;
    case 3:
      return type == U32 ? run<Increment, 1, RESULT> : nullptr;
    case 4:
      return type == U32 ? run<Decrement, 1, RESULT> : nullptr;
    case 5:
      return bits ? by_width.template operator()<And>() : nullptr;
    case 6:
      return bits ? by_width.template operator()<Or>() : nullptr;
    case 7:
      return bits ? by_width.template operator()<Xor>() : nullptr;
    case 8:
      return bits ? by_width.template operator()<Exchange>() : nullptr;
    case 9:
      return type == B16 ? run<CompareAndSwap<uint16_t>, 1, RESULT>
             : bits      ? by_width.template operator()<CompareAndSwap>()
                         : nullptr;
    default:
      return nullptr;
  }
}

template <bool RESULT>
Handler float_handler(Type type, int count) {
  switch (type) {
    case Type::F32:
      return counted<AddF32, RESULT, 1, 2, 4>(count);
    case Type::F64:
      return counted<AddF64, RESULT, 1>(count);
    case Type::F16:
      return counted<AddHalf<F16>, RESULT, 1, 2, 4, 8>(count);
    case Type::BF16:
      return counted<AddHalf<BF16>, RESULT, 1, 2, 4, 8>(count);
    case Type::F16X2:
      return counted<AddPair<F16>, RESULT, 1, 2, 4>(count);
    case Type::BF16X2:
      return counted<AddPair<BF16>, RESULT, 1, 2, 4>(count);
    default:
      return nullptr;
  }
}

// POLICY: the operand with the cache policy.
template <bool RESULT, bool FLOAT>
bool choose(const Chosen& chosen, Operation& operation) {
  const bool compare = chosen.has("cas");
  const int policy = (RESULT ? 3 : 2) + compare, values = RESULT ? 2 : 1;
  if (!compare && chosen.has("L2::cache_hint") != (operation.count[policy] != 0)) return false;
  const Type type = chosen.type();
  operation.option[0] = STRONG | (chosen.has("cta") ? 0 : DEVICE);
  if (chosen.has("acquire") || chosen.has("release") || chosen.has("acq_rel")) operation.option[0] |= ORDERED;
  operation.option[1] = compare;
  if (FLOAT) {
    static constexpr int COUNTS[] = {2, 4, 8};
    const int which = chosen.one_of({"v2", "v4", "v8"}, -1), count = which < 0 ? 1 : COUNTS[which];
    if (operation.count[values] != count || (RESULT && operation.count[0] != count)) return false;
    // Vectors are for global memory only.
    if (count > 1 && operation.space != Space::GLOBAL && operation.space != Space::GENERIC) return false;
    operation.run = float_handler<RESULT>(type, count);
  } else {
    operation.run = integer_handler<RESULT>(chosen, type);
  }
  return operation.run != nullptr;
}

constexpr Form FORMS[] = {
    {"atom",
     "relaxed|acquire|release|acq_rel? cta|cluster|gpu|sys? global|shared|shared::cta|shared::cluster? "
     "add|min|max|inc|dec|and|or|xor|exch L2::cache_hint? b32|b64|u32|u64|s32|s64",
     "=0, [a], 0, b64?", choose<true, false>},
    {"atom",
     "relaxed|acquire|release|acq_rel? cta|cluster|gpu|sys? global|shared|shared::cta|shared::cluster? cas b16|b32|b64",
     "=0, [a], 0, 0", choose<true, false>},
    {"atom",
     "relaxed|acquire|release|acq_rel? cta|cluster|gpu|sys? global|shared|shared::cta|shared::cluster? add "
     "L2::cache_hint? v2|v4? f32|f64",
     "=*0, [a], *0, b64?", choose<true, true>},
    {"atom",
     "relaxed|acquire|release|acq_rel? cta|cluster|gpu|sys? global|shared|shared::cta|shared::cluster? add noftz "
     "L2::cache_hint? v2|v4|v8? f16|bf16|f16x2|bf16x2",
     "=*0, [a], *0, b64?", choose<true, true>},
    {"red",
     "relaxed|release? cta|cluster|gpu|sys? global|shared|shared::cta|shared::cluster? "
     "add|min|max|inc|dec|and|or|xor L2::cache_hint? b32|b64|u32|u64|s32|s64",
     "[a], 0, b64?", choose<false, false>},
    {"red",
     "relaxed|release? cta|cluster|gpu|sys? global|shared|shared::cta|shared::cluster? add L2::cache_hint? v2|v4? "
     "f32|f64",
     "[a], *0, b64?", choose<false, true>},
    {"red",
     "relaxed|release? cta|cluster|gpu|sys? global|shared|shared::cta|shared::cluster? add noftz L2::cache_hint? "
     "v2|v4|v8? f16|bf16|f16x2|bf16x2",
     "[a], *0, b64?", choose<false, true>},
};

}  // namespace

Forms atomic_forms() { return FORMS; }

}  // namespace sparse24::ptx
