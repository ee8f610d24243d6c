// From the addresses of a warp's lanes to places in the host's memory, with all checks and counters on the way.
#pragma once
#include <bit>
#include <cstdint>
#include <cstring>

#include "csrc/ptx/machine.h"
#include "csrc/ptx/program.h"

namespace sparse24::ptx {

enum class Intent : uint8_t { READ, WRITE, ATOMIC };

// An access of some lanes of a warp, of `size` bytes each, a power of two up to 32.
struct Access {
  uint32_t size = 4;
  Intent intent = Intent::READ;
  bool strong = false;            // may synchronise: volatile, relaxed, acquire, release, atomic
  const uint8_t* data = nullptr;  // WRITE: the values, `size` bytes a lane

  // Filled by address_lanes. Lanes that take no part have the address of one that does.
  alignas(64) uint64_t address[LANES];
  // Filled by locate.
  uint8_t* host[LANES];  // of a bad READ: zeros
  uint32_t shared = 0;   // lanes whose address lies in shared memory
  uint32_t global = 0;
};

// The addresses of operand [slot + offset], the `which`-th address of the operation.
inline void address_lanes(Warp& warp, const Operation& operation, Slot slot, int which, uint32_t lanes,
                          Access& access) {
  if (operation.address_wide[which]) {
    const uint64_t offset = static_cast<uint64_t>(operation.offset[which]);
    const uint64_t* base = warp.lanes<uint64_t>(slot);
    for (int lane = 0; lane < LANES; ++lane) access.address[lane] = base[lane] + offset;
  } else {
    const uint32_t offset = static_cast<uint32_t>(operation.offset[which]);
    const uint32_t* base = warp.lanes<uint32_t>(slot);
    for (int lane = 0; lane < LANES; ++lane) access.address[lane] = base[lane] + offset;
  }
  if (lanes != ~0u) {
    const uint64_t any = access.address[std::countr_zero(lanes)];
    for (int lane = 0; lane < LANES; ++lane) {
      if ((lanes >> lane & 1) == 0) access.address[lane] = any;
    }
  }
}

// Checks the access, counts it, and says where in the host's memory each lane's bytes are. Addresses in windows are
// made offsets in their space. The result: the lanes that may go on; a READ may use host[] of the others as well.
uint32_t locate(Warp& warp, Space space, uint32_t lanes, Access& access);

// Around strong operations: what they tell other blocks and warps, and what they learn. `release`: with a fence of its
// own; `device`: of wider scope than the block.
void before_strong_write(Warp& warp, uint32_t lanes, const Access& access, bool release, bool device);
void after_strong_read(Warp& warp, uint32_t lanes, const Access& access, bool device);
void fence(Warp& warp, bool device);

// Calls body(lane) for each lane of a mask in turn.
template <class Body>
inline void in_turn(uint32_t lanes, Body&& body) {
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) body(static_cast<uint32_t>(std::countr_zero(rest)));
}

}  // namespace sparse24::ptx
