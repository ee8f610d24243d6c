// The operations that decode.cpp adds: conversions between slots of different widths, arguments of calls, clocks.
#include <cstring>

#include "csrc/ptx/decoder.h"
#include "csrc/ptx/machine.h"

namespace sparse24::ptx::hidden {

void narrow(Warp& warp, const Operation& operation, uint32_t lanes) {
  uint32_t* to = warp.lanes<uint32_t>(operation.slot[0]);
  const uint64_t* from = warp.lanes<uint64_t>(operation.slot[1]);
  each(lanes, [&](int l) { to[l] = static_cast<uint32_t>(from[l]); });
}

void widen_signed(Warp& warp, const Operation& operation, uint32_t lanes) {
  int64_t* to = warp.lanes<int64_t>(operation.slot[0]);
  const int32_t* from = warp.lanes<int32_t>(operation.slot[1]);
  each(lanes, [&](int l) { to[l] = from[l]; });
}

void widen_unsigned(Warp& warp, const Operation& operation, uint32_t lanes) {
  uint64_t* to = warp.lanes<uint64_t>(operation.slot[0]);
  const uint32_t* from = warp.lanes<uint32_t>(operation.slot[1]);
  each(lanes, [&](int l) { to[l] = from[l]; });
}

void extend_signed(Warp& warp, const Operation& operation, uint32_t lanes) {
  uint32_t* to = warp.lanes<uint32_t>(operation.slot[0]);
  const uint32_t* from = warp.lanes<uint32_t>(operation.slot[1]);
  const int shift = 32 - static_cast<int>(operation.immediate);
  each(lanes, [&](int l) { to[l] = static_cast<uint32_t>(static_cast<int32_t>(from[l] << shift) >> shift); });
}

void extend_unsigned(Warp& warp, const Operation& operation, uint32_t lanes) {
  uint32_t* to = warp.lanes<uint32_t>(operation.slot[0]);
  const uint32_t* from = warp.lanes<uint32_t>(operation.slot[1]);
  const uint32_t mask = (1u << operation.immediate) - 1;
  each(lanes, [&](int l) { to[l] = from[l] & mask; });
}

void negate(Warp& warp, const Operation& operation, uint32_t lanes) {
  uint32_t& to = warp.predicate(operation.slot[0]);
  to = (to & ~lanes) | (~warp.predicate(operation.slot[1]) & lanes);
}

void copy_local(Warp& warp, const Operation& operation, uint32_t lanes) {
  Block& block = *warp.block;
  const size_t bytes = static_cast<size_t>(operation.immediate), frame = block.program->local_bytes;
  each(lanes, [&](int l) {
    const size_t base = (static_cast<size_t>(warp.index) * LANES + static_cast<size_t>(l)) * frame;
    for (std::vector<uint8_t>* memory : {&block.local, &block.local_initialized}) {
      if (memory->size() < base + frame) continue;  // initialisation is not tracked
      std::memmove(memory->data() + base + operation.offset[0], memory->data() + base + operation.offset[1], bytes);
    }
  });
}

void move(Warp& warp, const Operation& operation, uint32_t lanes) {
  uint32_t* to = warp.lanes<uint32_t>(operation.slot[0]);
  const uint32_t* from = warp.lanes<uint32_t>(operation.slot[1]);
  each(lanes, [&](int l) { to[l] = from[l]; });
}

void move_wide(Warp& warp, const Operation& operation, uint32_t lanes) {
  uint64_t* to = warp.lanes<uint64_t>(operation.slot[0]);
  const uint64_t* from = warp.lanes<uint64_t>(operation.slot[1]);
  each(lanes, [&](int l) { to[l] = from[l]; });
}

void clock(Warp& warp, const Operation& operation, uint32_t lanes) {
  uint32_t* to = warp.lanes<uint32_t>(operation.slot[0]);
  const uint64_t now = warp.block->instructions >> operation.immediate;
  each(lanes, [&](int l) { to[l] = static_cast<uint32_t>(now); });
}

void clock_wide(Warp& warp, const Operation& operation, uint32_t lanes) {
  uint64_t* to = warp.lanes<uint64_t>(operation.slot[0]);
  each(lanes, [&](int l) { to[l] = warp.block->instructions; });
}

}  // namespace sparse24::ptx::hidden
