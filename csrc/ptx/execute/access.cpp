// The state spaces: which bytes an address means, and what is wrong with it where it means none.
#include "csrc/ptx/execute/access.h"

#include <string>

#include "csrc/ptx/block_order.h"
#include "csrc/ptx/execute/traffic.h"
#include "csrc/ptx/shared_memory.h"

namespace sparse24::ptx {
namespace {

alignas(64) constexpr uint8_t ZEROS[64] = {};
uint8_t* zeros() { return const_cast<uint8_t*>(ZEROS); }  // what bad reads read; nobody writes there

const char* name_of(Intent intent) {
  return intent == Intent::READ ? "read" : intent == Intent::WRITE ? "write" : "atomic";
}

std::string hexadecimal(uint64_t value) {
  char text[19];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

// "global read of 16 bytes at offset 4096 of a buffer of 4096 bytes"
std::string describe(const Access& access, const char* space, uint64_t offset, const char* what, uint64_t size) {
  return std::string(space) + " " + name_of(access.intent) + " of " + std::to_string(access.size) +
         " bytes at offset " + std::to_string(static_cast<int64_t>(offset)) + " of " + what + " of " +
         std::to_string(size) + " bytes";
}

// Of `size` bytes, those that were never written, a bit each.
uint32_t unwritten(const uint8_t* initialized, uint32_t size) {
  if (std::memchr(initialized, 0, size) == nullptr) return 0;
  uint32_t missing = 0;
  for (uint32_t i = 0; i < size; ++i) missing |= static_cast<uint32_t>(initialized[i] == 0) << i;
  return missing;
}

std::string describe_hole(const Definedness::Hole& hole, const char* space, uint64_t base, const char* what,
                          uint64_t size) {
  Access access;
  access.size = hole.size;
  return describe(access, space, hole.address - base, what, size) + "; the byte at offset " +
         std::to_string(hole.first() - base) + " has never been written";
}
std::string describe_global_hole(const Warp& warp, const Definedness::Hole& hole) {
  const Allocation& allocation = *warp.block->launch->memory.find(hole.address);
  return describe_hole(hole, "global", allocation.base, "a buffer", allocation.size);
}
std::string describe_local_hole(const Warp& warp, const Definedness::Hole& hole) {
  return describe_hole(hole, "local", 0, "a thread's local memory", warp.block->program->local_bytes);
}

OperationCounters& counters_of(Warp& warp) { return warp.block->counters[warp.current]; }

// ---- global ---------------------------------------------------------------------------------------------------------

// One lane's bytes, or null.
uint8_t* global_place(Warp& warp, uint32_t lane, const Access& access) {
  const uint64_t address = access.address[lane];
  const Allocation* allocation = warp.block->launch->memory.find(address);
  if (allocation == nullptr || (!allocation->live && !allocation->freed)) {
    warp.find_with(Kind::OUT_OF_BOUNDS, lane, address, [&] {
      return std::string("global ") + name_of(access.intent) + " of " + std::to_string(access.size) +
             " bytes at address " + hexadecimal(address) + ", where no buffer is";
    });
    return nullptr;
  }
  const uint64_t offset = address - allocation->base;
  const Kind kind = !allocation->live                                                      ? Kind::FREED
                    : offset > allocation->size || access.size > allocation->size - offset ? Kind::OUT_OF_BOUNDS
                    : (address & (access.size - 1)) != 0                                   ? Kind::MISALIGNED
                    : allocation->read_only && access.intent != Intent::READ               ? Kind::READ_ONLY
                                                                                           : Kind::ILLEGAL;
  if (kind == Kind::ILLEGAL) return allocation->host + offset;
  warp.find_with(kind, lane, address, [&] {
    const char* what = kind == Kind::FREED       ? "a freed buffer"
                       : kind == Kind::READ_ONLY ? "a constant variable"
                                                 : "a buffer";
    std::string message = describe(access, "global", offset, what, allocation->size);
    if (kind == Kind::MISALIGNED) {
      message += ": its address " + hexadecimal(address) + " is not a multiple of " + std::to_string(access.size);
    }
    return message;
  });
  return nullptr;
}

// The checks and counters of lanes whose bytes lie in one buffer.
void check_global(Warp& warp, uint32_t lanes, const Access& access, const Allocation& allocation) {
  Launch& launch = *warp.block->launch;
  const bool writes = access.intent != Intent::READ, reads = access.intent != Intent::WRITE;
  if (allocation.initialized != nullptr) {
    if (reads && launch.checks(Check::INIT)) {
      in_turn(lanes, [&](uint32_t lane) {
        const uint64_t offset = access.address[lane] - allocation.base;
        const uint32_t missing = unwritten(allocation.initialized + offset, access.size);
        if (missing == 0) return;
        warp.undefined.take(warp, {lane, missing, access.address[lane], access.size, describe_global_hole});
      });
    }
    if (writes) {
      in_turn(lanes, [&](uint32_t lane) {
        std::memset(allocation.initialized + (access.address[lane] - allocation.base), 1, access.size);
      });
    }
  }
  BlockOrder* const order = launch.order.get();
  if (order == nullptr || !order->active()) return;
  const uint64_t region = allocation.base >> REGION_BITS;
  GlobalCell* const cells = order->cells(allocation, region);
  const uint64_t stamp = order->stamp(warp.block->number);
  in_turn(lanes, [&](uint32_t lane) {
    const uint64_t offset = access.address[lane] - allocation.base;
    BlockOrder::Conflict conflict{};
    const bool race = writes ? order->races<true>(cells, offset, access.size, stamp, access.strong, conflict)
                             : order->races<false>(cells, offset, access.size, stamp, access.strong, conflict);
    if (!race) return;
    warp.find_with(Kind::RACE_GLOBAL, lane, access.address[lane], [&] {
      const std::string other =
          conflict.block == BlockOrder::Conflict::UNKNOWN ? "another block" : "block " + std::to_string(conflict.block);
      return describe(access, "global", offset, "a buffer", allocation.size) + ", where " + other + " has " +
             (conflict.write ? "written" : "read") + " without synchronising with this one";
    });
  });
}

uint32_t locate_global(Warp& warp, uint32_t lanes, Access& access) {
  Launch& launch = *warp.block->launch;
  const Allocation* allocation = launch.memory.find(access.address[std::countr_zero(lanes)]);
  uint32_t good = lanes;
  bool uniform = allocation != nullptr && allocation->live && allocation->size >= access.size &&
                 !(allocation->read_only && access.intent != Intent::READ);
  if (uniform) {
    const uint64_t base = allocation->base, limit = allocation->size - access.size;
    const uintptr_t host = reinterpret_cast<uintptr_t>(allocation->host);
    uint64_t bad = 0, low = 0;
    if (lanes == ~0u) {
      for (int lane = 0; lane < LANES; ++lane) {
        const uint64_t offset = access.address[lane] - base;
        bad |= offset > limit;
        low |= access.address[lane];
        access.host[lane] = reinterpret_cast<uint8_t*>(host + offset);
      }
    } else {
      in_turn(lanes, [&](uint32_t lane) {
        const uint64_t offset = access.address[lane] - base;
        bad |= offset > limit;
        low |= access.address[lane];
        access.host[lane] = reinterpret_cast<uint8_t*>(host + offset);
      });
    }
    uniform = (bad | (low & (access.size - 1))) == 0;
  }
  if (uniform) {
    check_global(warp, lanes, access, *allocation);
  } else {
    in_turn(lanes, [&](uint32_t lane) {
      access.host[lane] = global_place(warp, lane, access);
      if (access.host[lane] == nullptr) {
        access.host[lane] = zeros();
        good &= ~(1u << lane);
      } else {
        check_global(warp, 1u << lane, access, *launch.memory.find(access.address[lane]));
      }
    });
  }
  access.global |= good;
  if (launch.options.counters && good != 0) {
    uint64_t address[LANES];
    in_turn(good, [&](uint32_t lane) {
      const uint64_t region = access.address[lane] >> REGION_BITS;
      const uint64_t base = uniform ? allocation->base : launch.memory.find(access.address[lane])->base;
      address[lane] = (region << REGION_BITS) + (access.address[lane] - base);
    });
    count_global(counters_of(warp), good, address, access.size);
  }
  return good;
}

// ---- shared ---------------------------------------------------------------------------------------------------------

uint32_t locate_shared(Warp& warp, uint32_t lanes, Access& access) {
  SharedMemory& shared = *warp.block->shared;
  uint8_t* const bytes = shared.bytes.data();
  uint32_t good = lanes;
  if (!shared.checked()) {
    uint64_t bad = shared.bytes.size() < access.size, low = 0;
    const uint64_t limit = shared.bytes.size() - access.size;
    in_turn(lanes, [&](uint32_t lane) {
      bad |= access.address[lane] > limit;
      low |= access.address[lane];
    });
    if ((bad | (low & (access.size - 1))) == 0) {
      in_turn(lanes, [&](uint32_t lane) { access.host[lane] = bytes + access.address[lane]; });
    } else {
      in_turn(lanes, [&](uint32_t lane) {
        const bool inside = shared.check_bounds(warp, lane, access.address[lane], access.size, name_of(access.intent));
        access.host[lane] = inside ? bytes + access.address[lane] : zeros();
        if (!inside) good &= ~(1u << lane);
      });
    }
  } else if (!access.strong && access.size >= 4 && access.size <= 16) {
    good = access.intent == Intent::READ ? shared.read_lanes(warp, lanes, access.address, access.size)
                                         : shared.write_lanes(warp, lanes, access.address, access.size, access.data);
    in_turn(lanes, [&](uint32_t lane) {
      access.host[lane] = (good >> lane & 1) != 0 ? bytes + access.address[lane] : zeros();
    });
  } else {
    in_turn(lanes, [&](uint32_t lane) {
      const uint64_t address = access.address[lane];
      bool inside = false;
      switch (access.intent) {
        case Intent::READ:
          inside = shared.check_read(warp, lane, address, access.size, access.strong);
          break;
        case Intent::WRITE:
          // The values are written lane by lane: the next lane's write is compared with them.
          inside =
              shared.check_write(warp, lane, address, access.size, access.data + lane * access.size, access.strong);
          if (inside) std::memcpy(bytes + address, access.data + lane * access.size, access.size);
          break;
        case Intent::ATOMIC:
          inside = shared.check_atomic(warp, lane, address, access.size);
          break;
      }
      access.host[lane] = inside ? bytes + address : zeros();
      if (!inside) good &= ~(1u << lane);
    });
  }
  access.shared |= good;
  if (warp.block->launch->options.counters && good != 0) {
    count_shared(counters_of(warp), good, access.address, access.size);
  }
  return good;
}

// ---- local and parameters -------------------------------------------------------------------------------------------

// Memory of `size` bytes that starts at `host` for each lane, `stride` bytes apart.
uint32_t locate_private(Warp& warp, uint32_t lanes, Access& access, uint8_t* host, uint64_t stride, uint64_t size,
                        const char* space, const char* what) {
  uint32_t good = lanes;
  in_turn(lanes, [&](uint32_t lane) {
    const uint64_t address = access.address[lane];
    const bool outside = address > size || access.size > size - address;
    if (!outside && (address & (access.size - 1)) == 0) {
      access.host[lane] = host + lane * stride + address;
      return;
    }
    access.host[lane] = zeros();
    good &= ~(1u << lane);
    warp.find_with(outside ? Kind::OUT_OF_BOUNDS : Kind::MISALIGNED, lane, address, [&] {
      return describe(access, space, address, what, size) +
             (outside ? "" : ": not a multiple of " + std::to_string(access.size));
    });
  });
  if (warp.block->launch->options.counters) {
    counters_of(warp).bytes += uint64_t{access.size} * static_cast<uint32_t>(std::popcount(good));
  }
  return good;
}

uint32_t refuse(Warp& warp, uint32_t lanes, Access& access, Kind kind, const std::string& message) {
  in_turn(lanes, [&](uint32_t lane) {
    access.host[lane] = zeros();
    warp.find(kind, lane, access.address[lane], message);
  });
  return 0;
}

uint32_t locate_local(Warp& warp, uint32_t lanes, Access& access) {
  Block& block = *warp.block;
  if (access.intent == Intent::ATOMIC) {
    return refuse(warp, lanes, access, Kind::ILLEGAL, "an atomic operation on local memory");
  }
  const uint64_t size = block.program->local_bytes, base = uint64_t{warp.index} * LANES * size;
  const uint32_t good =
      locate_private(warp, lanes, access, block.local.data() + base, size, size, "local", "a thread's local memory");
  if (!block.local_initialized.empty()) {
    in_turn(good, [&](uint32_t lane) {
      uint8_t* const known = block.local_initialized.data() + base + lane * size + access.address[lane];
      if (access.intent == Intent::WRITE) {
        std::memset(known, 1, access.size);
      } else if (const uint32_t missing = unwritten(known, access.size)) {
        warp.undefined.take(warp, {lane, missing, access.address[lane], access.size, describe_local_hole});
      }
    });
  }
  return good;
}

uint32_t locate_parameter(Warp& warp, uint32_t lanes, Access& access) {
  if (access.intent != Intent::READ) {
    return refuse(warp, lanes, access, Kind::READ_ONLY, "a write to the kernel's parameters, which are constant");
  }
  const std::vector<uint8_t>& arguments = warp.block->launch->options.arguments;
  return locate_private(warp, lanes, access, const_cast<uint8_t*>(arguments.data()), 0, arguments.size(), "param",
                        "the kernel's parameters");
}

uint32_t locate_in(Warp& warp, Space space, uint32_t lanes, Access& access) {
  switch (space) {
    case Space::SHARED:
      return locate_shared(warp, lanes, access);
    case Space::LOCAL:
      return locate_local(warp, lanes, access);
    case Space::PARAM:
      return locate_parameter(warp, lanes, access);
    default:
      return locate_global(warp, lanes, access);
  }
}

}  // namespace

uint32_t locate(Warp& warp, Space space, uint32_t lanes, Access& access) {
  if (space != Space::GENERIC) return locate_in(warp, space, lanes, access);
  uint32_t good = 0, rest = lanes;
  for (const auto& [window, inside] :
       {std::pair{SHARED_WINDOW, Space::SHARED}, {LOCAL_WINDOW, Space::LOCAL}, {PARAM_WINDOW, Space::PARAM}}) {
    uint32_t here = 0;
    for (uint32_t lane = 0; lane < LANES; ++lane) {
      here |= static_cast<uint32_t>(access.address[lane] - window < WINDOW_BYTES) << lane;
    }
    here &= rest;
    if (here == 0) continue;
    in_turn(here, [&](uint32_t lane) { access.address[lane] -= window; });
    good |= locate_in(warp, inside, here, access);
    rest &= ~here;
  }
  return rest == 0 ? good : good | locate_global(warp, rest, access);
}

void fence(Warp& warp, bool device) {
  Launch& launch = *warp.block->launch;
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (!launch.checks(Check::RACE)) return;
  warp.block->shared->fence(warp);
  if (device && launch.order && launch.order->active()) launch.order->fence(warp.block->number);
}

void before_strong_write(Warp& warp, uint32_t lanes, const Access& access, bool release, bool device) {
  Launch& launch = *warp.block->launch;
  if (!launch.checks(Check::RACE)) return;
  if (release) fence(warp, device);
  in_turn(lanes & access.shared,
          [&](uint32_t lane) { warp.block->shared->publish(warp, static_cast<uint32_t>(access.address[lane])); });
  if (!device || !launch.order || !launch.order->active()) return;
  in_turn(lanes & access.global,
          [&](uint32_t lane) { launch.order->publish(warp.block->number, access.address[lane]); });
}

void after_strong_read(Warp& warp, uint32_t lanes, const Access& access, bool device) {
  Launch& launch = *warp.block->launch;
  if (!launch.checks(Check::RACE)) return;
  in_turn(lanes & access.shared,
          [&](uint32_t lane) { warp.block->shared->acquire(warp, lane, static_cast<uint32_t>(access.address[lane])); });
  if (!device || !launch.order || !launch.order->active()) return;
  in_turn(lanes & access.global,
          [&](uint32_t lane) { launch.order->acquire(warp.block->number, access.address[lane]); });
}

}  // namespace sparse24::ptx
