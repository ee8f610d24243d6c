// cp.async: bytes are taken from global memory at issue and written to shared memory when the thread waits for their
// group. Groups are counted by lane. What has not been waited for when the block ends is dropped.
// Source: PTX ISA, "cp.async", "cp.async.commit_group", "cp.async.wait_group / cp.async.wait_all".
#include <algorithm>
#include <cstring>

#include "csrc/ptx/execute/access.h"
#include "csrc/ptx/execute/memory_forms.h"
#include "csrc/ptx/execute/traffic.h"
#include "csrc/ptx/shared_memory.h"

namespace sparse24::ptx {
namespace {

// Operation::option: [1] bytes, [2] what operand 3 is.
enum Third : uint8_t { NOTHING, SOURCE_SIZE, IGNORE_SOURCE };

void issue(Warp& warp, const Operation& operation, uint32_t lanes) {
  SharedMemory& shared = *warp.block->shared;
  const uint32_t size = operation.option[1];
  Access to, from;
  address_lanes(warp, operation, operation.slot[0], 0, lanes, to);
  address_lanes(warp, operation, operation.slot[1], 1, lanes, from);
  const uint32_t good = shared.async_issue_lanes(warp, lanes, to.address, size);

  // How much each lane copies; zeros make up the rest.
  uint32_t amount[LANES], whole = good, partial = 0;
  if (operation.option[2] == SOURCE_SIZE) {
    const uint32_t* const given = warp.lanes<uint32_t>(operation.slot[3]);
    in_turn(good, [&](uint32_t lane) {
      amount[lane] = given[lane];
      if (given[lane] > size) {
        warp.find_with(Kind::ILLEGAL, lane, from.address[lane], [&] {
          return "cp.async of " + std::to_string(size) + " bytes with a src-size of " + std::to_string(given[lane]);
        });
        amount[lane] = size;
      }
      if (amount[lane] != size) {
        whole &= ~(1u << lane);
        if (amount[lane] != 0) partial |= 1u << lane;
      }
    });
  } else if (operation.option[2] == IGNORE_SOURCE) {
    whole &= ~warp.predicate(operation.slot[3]);
  }

  // Lanes that have committed different numbers of groups go into copies of their own.
  const size_t first_copy = warp.copies.size();
  for (uint32_t rest = good; rest != 0;) {
    const uint32_t group = warp.committed[std::countr_zero(rest)];
    uint32_t same = 0;
    in_turn(rest, [&](uint32_t lane) { same |= static_cast<uint32_t>(warp.committed[lane] == group) << lane; });
    rest &= ~same;
    AsyncCopy& copy = warp.copies.emplace_back();
    copy.lanes = same;
    copy.group = group;
    copy.operation = warp.current;
    copy.bytes = static_cast<uint8_t>(size);
    in_turn(same, [&](uint32_t lane) { copy.destination[lane] = static_cast<uint32_t>(to.address[lane]); });
    if ((same & ~whole) != 0) std::memset(copy.data, 0, sizeof copy.data);
  }
  const auto capture = [&](uint32_t which) {
    for (size_t i = first_copy; i < warp.copies.size(); ++i) {
      AsyncCopy& copy = warp.copies[i];
      const uint32_t here = which & copy.lanes;
      // Sizes that the compiler knows: a copy is then a load and a store.
      if (size == 16) {
        in_turn(here, [&](uint32_t lane) { std::memcpy(copy.data[lane], from.host[lane], 16); });
      } else if (size == 8) {
        in_turn(here, [&](uint32_t lane) { std::memcpy(copy.data[lane], from.host[lane], 8); });
      } else {
        in_turn(here, [&](uint32_t lane) { std::memcpy(copy.data[lane], from.host[lane], 4); });
      }
    }
  };
  from.size = size;
  if (whole != 0) {
    locate(warp, Space::GLOBAL, whole, from);  // zeros for what is bad
    capture(whole);
  }
  in_turn(partial, [&](uint32_t lane) {
    // The source is aligned as the whole would be, but only what is copied has to exist: bytes one by one.
    uint64_t start = from.address[lane];
    if ((start & (size - 1)) != 0) {
      warp.find_with(Kind::MISALIGNED, lane, start, [&] {
        return "cp.async read of global memory: its address is not a multiple of " + std::to_string(size);
      });
      return;
    }
    uint8_t bytes[16] = {};
    Access piece;
    for (uint32_t done = 0; done < amount[lane];) {
      // Powers of two, the largest first, keep every piece aligned.
      piece.size = std::bit_floor(amount[lane] - done);
      piece.address[lane] = start + done;
      locate(warp, Space::GLOBAL, 1u << lane, piece);
      std::memcpy(bytes + done, piece.host[lane], piece.size);
      done += piece.size;
    }
    from.host[lane] = bytes;
    capture(1u << lane);
  });
  if (warp.block->launch->options.counters && good != 0) {
    OperationCounters& counters = warp.block->counters[warp.current];
    const uint64_t bytes = counters.bytes;
    count_shared(counters, good, to.address, size);
    counters.bytes = bytes;  // they are counted where they come from
  }
}

void commit(Warp& warp, const Operation&, uint32_t lanes) {
  in_turn(lanes, [&](uint32_t lane) { ++warp.committed[lane]; });
}

// Leaves the `immediate` latest groups pending.
void wait_group(Warp& warp, const Operation& operation, uint32_t lanes) {
  if (warp.copies.empty()) return;
  const uint32_t pending = static_cast<uint32_t>(operation.immediate);
  uint32_t before[LANES] = {};
  in_turn(lanes,
          [&](uint32_t lane) { before[lane] = warp.committed[lane] > pending ? warp.committed[lane] - pending : 0; });
  warp.deliver(lanes, before);
}

void wait_all(Warp& warp, const Operation& operation, uint32_t lanes) {
  commit(warp, operation, lanes);
  wait_group(warp, operation, lanes);  // its immediate is 0
}

template <Third THIRD, int POLICY>  // POLICY: the operand with the cache policy; -1: none
bool choose(const Chosen& chosen, Operation& operation) {
  if (operation.immediate != 16 && (chosen.has("cg") || (operation.immediate != 4 && operation.immediate != 8))) {
    return false;
  }
  if (chosen.has("L2::cache_hint") != (POLICY >= 0)) return false;
  operation.option[1] = static_cast<uint8_t>(operation.immediate);
  operation.option[2] = THIRD != NOTHING && operation.slot[3] != NO_SLOT ? THIRD : NOTHING;
  operation.run = issue;
  return true;
}

bool choose_commit(const Chosen&, Operation& operation) {
  operation.run = commit;
  return true;
}
bool choose_wait_group(const Chosen&, Operation& operation) {
  operation.run = wait_group;
  return operation.immediate >= 0 && operation.immediate <= INT32_MAX;
}
bool choose_wait_all(const Chosen&, Operation& operation) {
  operation.run = wait_all;
  return true;
}

constexpr std::string_view COPY = "async ca|cg shared|shared::cta global L2::cache_hint? L2::64B|L2::128B|L2::256B?";
constexpr Form FORMS[] = {
    {"cp", COPY, "[a], [a], i, u32?", choose<SOURCE_SIZE, -1>},
    {"cp", COPY, "[a], [a], i, !p", choose<IGNORE_SOURCE, -1>},
    {"cp", COPY, "[a], [a], i, b64", choose<NOTHING, 3>},
    {"cp", COPY, "[a], [a], i, u32, b64", choose<SOURCE_SIZE, 4>},
    {"cp", COPY, "[a], [a], i, !p, b64", choose<IGNORE_SOURCE, 4>},
    {"cp", "async commit_group", "", choose_commit},
    {"cp", "async wait_group", "i", choose_wait_group},
    {"cp", "async wait_all", "", choose_wait_all},
};

}  // namespace

Forms async_copy_forms() { return FORMS; }

void Warp::deliver(uint32_t lanes, const uint32_t* before_group) {
  SharedMemory& shared = *block->shared;
  for (AsyncCopy& copy : copies) {
    uint32_t due = 0;
    in_turn(copy.lanes & lanes,
            [&](uint32_t lane) { due |= static_cast<uint32_t>(copy.group < before_group[lane]) << lane; });
    copy.lanes &= ~due;
    if (due != 0) shared.async_delivery_lanes(*this, due, copy.destination, copy.bytes, copy.data);
  }
  const auto first = std::find_if(copies.begin(), copies.end(), [](const AsyncCopy& copy) { return copy.lanes != 0; });
  copies.erase(copies.begin(), first);
}

}  // namespace sparse24::ptx
