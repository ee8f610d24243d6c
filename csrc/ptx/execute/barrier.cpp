// Barriers of a block, bar and barrier, and of a warp, bar.warp.sync. The counting is Block's.
#include "csrc/ptx/execute/barrier.h"

#include <algorithm>
#include <bit>
#include <string>

#include "csrc/ptx/lane_mask.h"
#include "csrc/ptx/machine.h"

namespace sparse24::ptx {
namespace {

// What PTX asks of the operands; "" where they are right.
std::string misuse(const Block& block, uint32_t id, uint32_t expected, bool arrives_only) {
  const std::string count = std::to_string(expected);
  if (id > 15) return "barrier " + std::to_string(id) + " does not exist: they are numbered 0 to 15";
  if (expected % LANES != 0) return "a barrier for " + count + " threads: the count has to be a multiple of 32";
  if (expected == 0 && arrives_only) return "an arrival at a barrier has to say for how many threads, not 0";
  if (expected > block.warps.size() * LANES) {
    return "a barrier for " + count + " threads, but the block has " + std::to_string(block.threads);
  }
  return "";
}

// option[0]: Reduction; option[1]: whether it is .arrive. Slots: [result of .red], barrier, [threads], [predicate].
void barrier(Warp& warp, const Operation& operation, uint32_t lanes) {
  Block& block = *warp.block;
  const auto reduction = static_cast<Reduction>(operation.option[0]);
  const bool reduces = reduction != Reduction::NONE, arrives_only = operation.option[1] != 0;
  const Slot* const slot = operation.slot + (reduces ? 1 : 0);
  const uint32_t* const ids = warp.lanes<uint32_t>(slot[0]);
  const uint32_t* const counts = slot[1] == NO_SLOT ? nullptr : warp.lanes<uint32_t>(slot[1]);
  const uint32_t truths = reduces ? warp.predicate(slot[2]) & lanes : 0;
  const uint32_t at = warp.current;
  for (uint32_t rest = lanes; rest != 0;) {
    const uint32_t lane = first_lane(rest), id = ids[lane], expected = counts == nullptr ? 0 : counts[lane];
    uint32_t same =
        lanes_where(rest, [&](int l) { return ids[l] == id && (counts == nullptr || counts[l] == expected); });
    if (operation.presence == Presence::ALIGNED && same != rest) {
      warp.find(Kind::ILLEGAL, first_lane(rest & ~same), 0,
                "lanes of one warp name different barriers or thread counts");
      same = rest;
    }
    rest &= ~same;
    const std::string wrong = misuse(block, id, expected, arrives_only);
    if (wrong.empty()) {
      block.arrive(warp, {same, id, expected, !arrives_only, reduction, truths & same});
    } else {
      warp.find(Kind::ILLEGAL, lane, 0, wrong);
      warp.wake(same, at);
    }
  }
}

template <bool ALIGNED>
bool choose(const Chosen& chosen, Operation& operation) {
  operation.run = barrier;
  operation.flow = Flow::BARRIER;
  operation.presence = ALIGNED || chosen.has("aligned") ? Presence::ALIGNED : Presence::ACTIVE;
  operation.option[1] = chosen.has("arrive");
  if (chosen.has("red")) {
    operation.option[0] = static_cast<uint8_t>(1 + chosen.one_of({"popc", "and", "or"}, 0));
  }
  return true;
}

// Orders the memory accesses of the lanes of its mask.
void warp_barrier(Warp& warp, const Operation& operation, uint32_t lanes) {
  find_exited_members(warp, operation, lanes);
  const uint32_t now = ++warp.block->time;
  lanes &= warp.lanes<uint32_t>(operation.mask)[first_lane(lanes)];
  if (lanes == warp.alive) {
    warp.synced_all = now;
    return;
  }
  if (!warp.synced) warp.synced = std::make_unique<uint32_t[][LANES]>(LANES);
  uint32_t known[LANES] = {};  // what any of them knows, all know now
  each(lanes, [&](int lane) {
    for (int other = 0; other < LANES; ++other) known[other] = std::max(known[other], warp.synced[lane][other]);
  });
  each(lanes, [&](int lane) { known[lane] = now; });
  each(lanes, [&](int lane) { std::copy_n(known, LANES, warp.synced[lane]); });
}

bool choose_warp_barrier(const Chosen&, Operation& operation) {
  operation.run = warp_barrier;
  operation.flow = Flow::BARRIER;
  return true;
}

constexpr Form FORMS[] = {
    {"bar", "cta? sync", "u32, u32?", choose<true>},
    {"bar", "cta? arrive", "u32, u32", choose<true>},
    {"bar", "cta? red popc u32", "=u32, u32, u32?, !p", choose<true>},
    {"bar", "cta? red and|or pred", "=p, u32, u32?, !p", choose<true>},
    {"barrier", "cta? sync aligned?", "u32, u32?", choose<false>},
    {"barrier", "cta? arrive aligned?", "u32, u32", choose<false>},
    {"barrier", "cta? red popc aligned? u32", "=u32, u32, u32?, !p", choose<false>},
    {"barrier", "cta? red and|or aligned? pred", "=p, u32, u32?, !p", choose<false>},
    {"bar", "warp sync", "m", choose_warp_barrier},
};

}  // namespace

Forms barrier_forms() { return FORMS; }

void find_exited_members(Warp& warp, const Operation& operation, uint32_t lanes) {
  const uint32_t mask = warp.lanes<uint32_t>(operation.mask)[first_lane(lanes)];
  const uint32_t exited = mask & warp.started & ~warp.alive;
  if (exited == 0) return;
  warp.find_with(Kind::EXITED_LANE, first_lane(exited), 0, [&] {
    return "the member mask names " + std::to_string(std::popcount(exited)) + " lanes that have exited, lane " +
           std::to_string(first_lane(exited)) + " being the first";
  });
}

}  // namespace sparse24::ptx
