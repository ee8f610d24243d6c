// Counting, finding and moving bits and bit fields. Source: PTX ISA, "Integer Arithmetic Instructions", popc to bmsk.
#include <algorithm>

#include "csrc/ptx/execute/family.h"
#include "csrc/ptx/execute/lanes.h"

namespace sparse24::ptx {
namespace {

constexpr uint32_t NOT_FOUND = ~0u;

template <class T>
constexpr uint32_t WIDTH = 8 * sizeof(T);

constexpr auto population = []<class T>(T a) { return std::popcount(a); };
constexpr auto leading_zeros = []<class T>(T a) { return std::countl_zero(a); };

// The highest bit that differs from the sign; an unsigned number's sign is 0.
template <bool SHIFT_AMOUNT>
constexpr auto find_bit = []<class T>(T a) -> uint32_t {
  using U = std::make_unsigned_t<T>;
  const uint32_t zeros = static_cast<uint32_t>(std::countl_zero(static_cast<U>(a < 0 ? ~a : a)));
  if (zeros == WIDTH<T>) return NOT_FOUND;
  return SHIFT_AMOUNT ? zeros : WIDTH<T> - 1 - zeros;
};

constexpr auto find_nth = [](uint32_t mask, uint32_t base, int32_t offset) -> uint32_t {
  if (base > 31) return NOT_FOUND;  // undefined by the ISA
  if (offset == 0) return (mask >> base) & 1 ? base : NOT_FOUND;
  const int step = offset > 0 ? 1 : -1;
  int64_t left = offset > 0 ? int64_t{offset} : -int64_t{offset};
  for (int at = static_cast<int>(base); at >= 0 && at < 32; at += step) {
    if (((mask >> at) & 1) && --left == 0) return static_cast<uint32_t>(at);
  }
  return NOT_FOUND;
};

constexpr auto reverse = []<class T>(T a) {
  T d = 0;
  for (uint32_t i = 0; i < WIDTH<T>; ++i) d |= ((a >> i) & 1) << (WIDTH<T> - 1 - i);
  return d;
};

// The lowest `length` bits; all of them where that is as long as T, or longer.
template <class T>
T low_bits(uint32_t length) {
  return length >= WIDTH<T> ? static_cast<T>(~T{0}) : static_cast<T>((T{1} << length) - 1);
}

constexpr auto extract = []<class T>(T a, uint32_t b, uint32_t c) -> T {
  using U = std::make_unsigned_t<T>;
  const uint32_t position = b & 0xff, length = c & 0xff;
  if (length == 0) return 0;
  const uint32_t last = std::min(position + length - 1, WIDTH<T> - 1);
  const bool sign = std::is_signed_v<T> && ((static_cast<U>(a) >> last) & 1);
  if (position >= WIDTH<T>) return static_cast<T>(sign ? ~U{0} : U{0});
  const U field = low_bits<U>(last - position + 1);
  return static_cast<T>(((static_cast<U>(a) >> position) & field) | (sign ? ~field : U{0}));
};

constexpr auto insert = []<class T>(T a, T b, uint32_t c, uint32_t d) -> T {
  const uint32_t position = c & 0xff, length = d & 0xff;
  if (position >= WIDTH<T>) return b;
  const T field = static_cast<T>(low_bits<T>(length) << position);
  return (b & ~field) | ((a << position) & field);
};

template <bool CLAMP>
constexpr auto extend = []<class T>(T a, uint32_t b) -> T {
  if (CLAMP && b >= 32) return a;
  const uint32_t length = b & 31;
  if (length == 0) return 0;
  const int shift = static_cast<int>(32 - length);
  return static_cast<T>(static_cast<uint32_t>(a) << shift) >> shift;
};

template <bool CLAMP>
constexpr auto mask = [](uint32_t a, uint32_t b) -> uint32_t {
  if (CLAMP && a >= 32) return 0;
  return low_bits<uint32_t>(CLAMP ? b : b & 31) << (a & 31);
};

// Operands and result of different types: T is that of the instruction.
template <auto F, class... T>
bool choose_count(Type type, Operation& operation, Types<T...>) {
  return ((stands_for<T>(type) && (operation.run = lanewise<F, uint32_t, T>)) || ...);
}
template <auto F>
bool count(const Chosen& chosen, Operation& operation) {
  return choose_count<F>(chosen.type(), operation, Types<uint32_t, uint64_t>());
}
template <bool SHIFT_AMOUNT>
bool choose_find(const Chosen& chosen, Operation& operation) {
  return choose_count<find_bit<SHIFT_AMOUNT>>(chosen.type(), operation, Types<uint32_t, uint64_t, int32_t, int64_t>());
}

template <class... T>
bool choose_extract(Type type, Operation& operation, Types<T...>) {
  return ((stands_for<T>(type) && (operation.run = lanewise<extract, T, T, uint32_t, uint32_t>)) || ...);
}
bool extraction(const Chosen& chosen, Operation& operation) {
  return choose_extract(chosen.type(), operation, Types<uint32_t, uint64_t, int32_t, int64_t>());
}

bool insertion(const Chosen& chosen, Operation& operation) {
  operation.run = bits_of(chosen.type()) == 64 ? lanewise<insert, uint64_t, uint64_t, uint64_t, uint32_t, uint32_t>
                                               : lanewise<insert, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t>;
  return true;
}

template <bool CLAMP>
bool extension(const Chosen& chosen, Operation& operation) {
  operation.run = is_signed(chosen.type()) ? lanewise<extend<CLAMP>, int32_t, int32_t, uint32_t>
                                           : lanewise<extend<CLAMP>, uint32_t, uint32_t, uint32_t>;
  return true;
}

constexpr Form FORMS[] = {
    {"popc", "b32|b64", "=u32, 0", count<population>},
    {"clz", "b32|b64", "=u32, 0", count<leading_zeros>},
    {"bfind", "u32|u64|s32|s64", "=u32, 0", choose_find<false>},
    {"bfind", "shiftamt u32|u64|s32|s64", "=u32, 0", choose_find<true>},
    {"fns", "b32", "=b32, b32, b32, s32", always<lanewise<find_nth, uint32_t, uint32_t, uint32_t, int32_t>>},
    {"brev", "b32|b64", "=0, 0", by_type<reverse, 1, Types<uint32_t, uint64_t>>},
    {"bfe", "u32|u64|s32|s64", "=0, 0, u32, u32", extraction},
    {"bfi", "b32|b64", "=0, 0, 0, u32, u32", insertion},
    {"szext", "clamp u32|s32", "=0, 0, u32", extension<true>},
    {"szext", "wrap u32|s32", "=0, 0, u32", extension<false>},
    {"bmsk", "clamp b32", "=b32, b32, b32", always<uniform<mask<true>, uint32_t, 2>()>},
    {"bmsk", "wrap b32", "=b32, b32, b32", always<uniform<mask<false>, uint32_t, 2>()>},
};

}  // namespace

Forms bit_forms() { return FORMS; }

}  // namespace sparse24::ptx
