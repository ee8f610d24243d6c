// Masks of the lanes of a warp, a bit each.
#pragma once
#include <bit>
#include <cstdint>
#include <cstdio>
#include <string>

#include "csrc/ptx/machine.h"

namespace sparse24::ptx {

inline uint32_t first_lane(uint32_t lanes) { return static_cast<uint32_t>(std::countr_zero(lanes)); }

// The whole warp is the common case, and counting bits is a call without -mpopcnt.
inline uint32_t lane_count(uint32_t lanes) {
  return lanes == ~0u ? LANES : static_cast<uint32_t>(std::popcount(lanes));
}

inline std::string in_hex(uint32_t lanes) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", lanes);
  return text;
}

// The lanes for which `condition` is true.
template <class Condition>
uint32_t lanes_where(uint32_t lanes, Condition&& condition) {
  uint32_t found = 0;
  each(lanes, [&](int lane) { found |= static_cast<uint32_t>(condition(lane)) << lane; });
  return found;
}

// Of `lanes`, those with the same value as the first.
template <class T>
uint32_t same_as_first(const T* values, uint32_t lanes) {
  const T value = values[first_lane(lanes)];
  return lanes_where(lanes, [&](int lane) { return values[lane] == value; });
}

}  // namespace sparse24::ptx
