// A block: its warps taken in turn, its sixteen barriers, and what it means when none of its warps can go on.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>

#include "csrc/ptx/lane_mask.h"
#include "csrc/ptx/machine.h"
#include "csrc/ptx/shared_memory.h"

namespace sparse24::ptx {
namespace {

constexpr uint64_t WARP_SLICE = 8192;       // operations after which the next warp has its turn
constexpr uint64_t RANDOM_WARP_SLICE = 64;  // at most, of Order::RANDOM: mixes the warps between barriers
constexpr uint8_t POISON = 0xcd;

// The result of bar.red, written when the barrier is complete.
void write_reduction(Warp& warp, const Operation& operation, uint32_t lanes, const Barrier& barrier) {
  const auto reduction = static_cast<Reduction>(operation.option[0]);
  if (reduction == Reduction::NONE || operation.slot[0] == NO_SLOT) return;
  if (reduction == Reduction::POPC) {
    uint32_t* const result = warp.lanes<uint32_t>(operation.slot[0]);
    each(lanes, [&](int lane) { result[lane] = barrier.truths; });
    return;
  }
  const bool value = reduction == Reduction::AND ? barrier.truths == barrier.voters : barrier.truths != 0;
  uint32_t& result = warp.predicate(operation.slot[0]);
  result = value ? result | lanes : result & ~lanes;
}

}  // namespace

uint64_t Block::random() {  // xorshift64*, Vigna 2016
  random_ ^= random_ >> 12;
  random_ ^= random_ << 25;
  random_ ^= random_ >> 27;
  return random_ * 0x2545f4914f6cdd1d;
}

void Block::start(Launch& owner, uint32_t index) {
  launch = &owner;
  program = &owner.program;
  const LaunchOptions& options = owner.options;
  number = index;
  coordinates[0] = index % options.grid[0];
  coordinates[1] = index / options.grid[0] % options.grid[1];
  coordinates[2] = index / options.grid[0] / options.grid[1];
  threads = options.block[0] * options.block[1] * options.block[2];
  abandoned = false;
  spent = 0;
  time = 1;
  std::memset(synced, 0, sizeof synced);
  std::fill_n(barriers, 16, Barrier{});
  random_ = (options.seed + 1) * 0x9e3779b97f4a7c15 ^ (uint64_t{index} << 20) ^ 0x1234567;
  if (random_ == 0) random_ = 1;

  if (!shared) shared = std::make_unique<SharedMemory>();
  shared->start(*this, program->dynamic_offset + options.dynamic_shared);
  const uint32_t count = (threads + LANES - 1) / LANES;
  const size_t local_size = size_t{count} * LANES * program->local_bytes;
  local.assign(local_size, POISON);
  local_initialized.assign(owner.checks(Check::INIT) ? local_size : 0, 0);
  if (counters.size() != program->operations.size()) counters.assign(program->operations.size(), {});

  const size_t file = (owner.initial_registers.size() + 63) / 64 * 64;
  if (register_bytes_ < count * file) {
    registers_.reset(new uint8_t[count * file + 64]);
    register_bytes_ = count * file;
  }
  uint8_t* const aligned = registers_.get() + (64 - reinterpret_cast<uintptr_t>(registers_.get()) % 64) % 64;
  warps.resize(count);
  turns_.resize(count);
  std::iota(turns_.begin(), turns_.end(), 0);
  if (options.order == Order::REVERSE) std::ranges::reverse(turns_);
  for (uint32_t i = 0; i < count; ++i) {
    warps[i].registers = aligned + i * file;
    std::memcpy(warps[i].registers, owner.initial_registers.data(), owner.initial_registers.size());
    warps[i].start(*this, i);
    owner.fill_specials(warps[i]);
  }
}

bool Block::run(uint64_t slice) {
  const Order order = launch->options.order;
  const uint64_t end = spent + slice;
  const uint32_t count = static_cast<uint32_t>(warps.size());
  while (true) {
    bool ran = false, done = true;
    if (order == Order::RANDOM) {
      for (uint32_t i = count - 1; i > 0; --i) std::swap(turns_[i], turns_[(random() >> 32) % (i + 1)]);
    }
    for (const uint32_t turn : turns_) {
      Warp& warp = warps[turn];
      if (warp.state == Warp::State::READY) {
        ran = true;
        warp.run(order == Order::RANDOM ? 1 + (random() >> 32) % RANDOM_WARP_SLICE : WARP_SLICE);
        if (abandoned) return true;
      }
    }
    for (const Warp& warp : warps) done = done && warp.state == Warp::State::DONE;
    if (done) return true;
    if (!ran) {
      resolve();
      if (abandoned) return true;
    }
    if (spent >= end) return false;
  }
}

void Block::abandon(Kind kind, Warp& warp, const std::string& message) {
  if (!message.empty()) warp.find(kind, warp.alive != 0 ? first_lane(warp.alive) : 0, 0, message);
  abandoned = true;
  // After a trap the device runs nothing more; after a budget is used up, the next blocks would use up theirs.
  if (kind == Kind::TRAP || kind == Kind::BUDGET) launch->stopped = true;
}

void Block::arrive(Warp& warp, const Arrival& arrival) {
  const uint32_t at = warp.current;
  const bool aligned = program->operations[at].presence == Presence::ALIGNED;
  Barrier& barrier = barriers[arrival.id];
  const bool whole_block = arrival.expected == 0;
  const uint32_t expected = whole_block ? static_cast<uint32_t>(warps.size()) * LANES : arrival.expected;
  if (barrier.expected == 0) {
    barrier.expected = expected;
    barrier.whole_block = whole_block;
    barrier.reduction = arrival.reduction;
    barrier.operation = at;
  } else if (barrier.expected != expected) {
    warp.find_with(Kind::ILLEGAL, first_lane(arrival.lanes), 0, [&] {
      return "barrier " + std::to_string(arrival.id) + " for " + std::to_string(expected) + " threads, but line " +
             std::to_string(line_of(barrier.operation)) + " has come to it for " + std::to_string(barrier.expected);
    });
  } else if (barrier.reduction != arrival.reduction) {
    warp.find_with(Kind::ILLEGAL, first_lane(arrival.lanes), 0, [&] {
      return "barrier " + std::to_string(arrival.id) + " is under way with another operation, at line " +
             std::to_string(line_of(barrier.operation));
    });
  }
  const uint32_t exited = warp.started & ~warp.alive;
  if (aligned && exited != 0) {
    warp.find_with(Kind::EXITED_LANE, first_lane(exited), 0, [&] {
      return std::to_string(lane_count(exited)) + " threads of the warp have exited without coming to barrier " +
             std::to_string(arrival.id);
    });
  }
  barrier.truths += lane_count(arrival.truths);
  barrier.voters += lane_count(arrival.lanes);
  barrier.here[warp.index] |= arrival.lanes;
  if (arrival.sleeps) barrier.sleeps[warp.index] |= arrival.lanes;
  warp.asleep |= arrival.lanes;
  if ((aligned && !warp.split_arrival) || (warp.alive & ~barrier.here[warp.index]) == 0) warp_arrives(warp, arrival.id);
}

void Block::lanes_exited(Warp& warp) {
  for (uint32_t id = 0; id < 16; ++id) {
    const uint32_t here = barriers[id].here[warp.index];
    if (here != 0 && (warp.alive & ~here) == 0) warp_arrives(warp, id);
  }
}

// All lanes of a warp are at the barrier.
void Block::warp_arrives(Warp& warp, uint32_t id) {
  Barrier& barrier = barriers[id];
  const uint32_t w = warp.index;
  if (!barrier.whole_block || (barrier.members >> w & 1) == 0) barrier.arrived += LANES;
  barrier.members |= 1u << w;
  // What this warp has done, and what it knew to be done, comes before what those do who wait for the barrier. What it
  // does from now on does not: hence the step of time.
  ++time;
  for (uint32_t b = 0; b < LANES; ++b) barrier.clock[b] = std::max(barrier.clock[b], synced[w][b]);
  barrier.clock[w] = time;
  const uint32_t go_on = barrier.here[w] & ~barrier.sleeps[w];
  barrier.here[w] = 0;
  for (uint32_t rest = go_on; rest != 0;) {
    const uint32_t at = warp.pc[first_lane(rest)];
    const uint32_t same = same_as_first(warp.pc, rest);
    warp.wake(same, at);
    rest &= ~same;
  }
  if (barrier.arrived >= barrier.expected) complete(id);
}

void Block::complete(uint32_t id) {
  const Barrier barrier = barriers[id];
  barriers[id] = Barrier{};
  ++barriers_completed;
  ++time;
  for (uint32_t w = 0; w < warps.size(); ++w) {
    const uint32_t lanes = barrier.sleeps[w];
    if (lanes == 0) continue;
    Warp& warp = warps[w];
    for (uint32_t b = 0; b < LANES; ++b) synced[w][b] = std::max(synced[w][b], barrier.clock[b]);
    if ((warp.alive & ~lanes) == 0) warp.synced_all = time;
    for (uint32_t rest = lanes; rest != 0;) {
      const uint32_t at = warp.pc[first_lane(rest)];
      const uint32_t same = same_as_first(warp.pc, rest);
      write_reduction(warp, program->operations[at], same, barrier);
      warp.wake(same, at);
      rest &= ~same;
    }
  }
}

// "warp 2 at line 31"
std::string Block::place_of_sleepers(uint32_t id) const {
  for (uint32_t w = 0; w < warps.size(); ++w) {
    const uint32_t lanes = barriers[id].sleeps[w] | barriers[id].here[w];
    if (lanes == 0) continue;
    return "warp " + std::to_string(w) + " at line " + std::to_string(line_of(warps[w].pc[first_lane(lanes)]));
  }
  return "nobody";
}

// No warp can go on, and some are not done: says why, and lets those go on that would on a device.
void Block::resolve() {
  for (Warp& warp : warps) {
    if (warp.waiting != 0) return warp.force();  // its other lanes sleep at a barrier that needs these
  }
  uint32_t in_use = 0, sleeper = 0, at = 0;
  for (uint32_t id = 0; id < 16; ++id) {
    const Barrier& barrier = barriers[id];
    bool asleep = false;
    for (uint32_t w = 0; w < warps.size(); ++w) {
      const uint32_t lanes = barrier.sleeps[w] | barrier.here[w];
      if (lanes == 0) continue;
      if (in_use == 0 && !asleep) {
        sleeper = w;
        at = warps[w].pc[first_lane(lanes)];
      }
      asleep = true;
    }
    in_use |= static_cast<uint32_t>(asleep) << id;
    if (!asleep || !barrier.whole_block) continue;
    uint32_t missing = 0, living = 0;  // warps that have not come
    for (uint32_t w = 0; w < warps.size(); ++w) {
      if ((barrier.members >> w & 1) != 0) continue;
      missing |= 1u << w;
      if (warps[w].alive != 0) living |= 1u << w;
    }
    if (missing != 0 && living == 0) {
      // PTX ISA, "bar, barrier": who has exited is not waited for. But .aligned says that all threads execute it.
      const uint32_t w = first_lane(missing);
      for (Warp& warp : warps) {
        const uint32_t lanes = barrier.sleeps[warp.index];
        if (lanes == 0 || program->operations[warp.pc[first_lane(lanes)]].presence != Presence::ALIGNED) continue;
        warp.current = warp.pc[first_lane(lanes)];
        warp.find_with(Kind::EXITED_LANE, first_lane(lanes), 0, [&] {
          return "warp " + std::to_string(w) + " has exited without coming to barrier " + std::to_string(id) +
                 ", which all threads of the block have to";
        });
        break;
      }
      return complete(id);
    }
  }
  Warp& warp = warps[sleeper];
  warp.current = at;
  const uint32_t id = first_lane(in_use | 1u << 15);
  const Barrier& barrier = barriers[id];
  const std::string wants = "barrier " + std::to_string(id) + " waits for " + std::to_string(barrier.expected) +
                            " threads (" + place_of_sleepers(id) + "), " + std::to_string(barrier.arrived) +
                            " have come";
  const uint32_t others = in_use & (in_use - 1);
  if (others == 0) return abandon(Kind::DEADLOCK, warp, wants + ", and no other can");
  const Kind kind = launch->findings.wanted(Kind::DIVERGENT_BARRIER) ? Kind::DIVERGENT_BARRIER : Kind::DEADLOCK;
  abandon(
      kind, warp,
      wants + "; " + place_of_sleepers(first_lane(others)) + " waits at barrier " + std::to_string(first_lane(others)));
}

}  // namespace sparse24::ptx
