// The loop that runs a warp: which lanes go next, where they part, and where they meet again.
//
// Lanes that can go on stand in groups of equal program counter, one of which runs: the one with the lowest, until it
// meets or passes another. A group that has waited for QUANTUM operations while others ran has a turn of as many
// wherever it stands, so that a lane may spin until another, further on, releases it.
//
// Not among the groups are lanes that wait for others of their warp (`waiting`) and those that sleep at a barrier of
// the block (`asleep`); pc[] says where.
#include <algorithm>
#include <string>

#include "csrc/ptx/lane_mask.h"
#include "csrc/ptx/machine.h"

namespace sparse24::ptx {
namespace {

constexpr uint64_t QUANTUM = 2048;
constexpr uint32_t NEVER = ~0u;    // no operation has this number
constexpr size_t MAX_CALLS = 256;  // decode.cpp refuses recursion, and calls that nest deeper than 200

}  // namespace

void Warp::start(Block& owner, uint32_t number) {
  block = &owner;
  index = number;
  const uint32_t threads = std::min<uint32_t>(owner.threads - number * LANES, LANES);
  started = alive = threads == LANES ? ~0u : (1u << threads) - 1;
  state = State::READY;
  waiting = asleep = current = carry = 0;
  parked_count_ = 0;
  running_ = {owner.program->entry, alive, 0};
  fair_ = lanes_left_ = false;
  executed_ = 0;
  for (auto& stack : calls) stack.clear();
  copies.clear();
  std::fill_n(committed, LANES, 0u);
  synced_all = 0;
  synced.reset();
  undefined.start(*owner.program);
}

// Joins the lanes that can go on.
void Warp::park(uint32_t at, uint32_t lanes) {
  for (uint32_t i = 0; i < parked_count_; ++i) {
    if (parked_[i].pc == at) {
      parked_[i].lanes |= lanes;
      return;
    }
  }
  parked_[parked_count_++] = {at, lanes, executed_};
}

// Makes the lowest group the one that runs. Where there is none, says what the warp is now.
bool Warp::choose() {
  fair_ = false;
  if (parked_count_ == 0) {
    state = alive == 0 ? State::DONE : State::SLEEPING;
    return false;
  }
  Group* const lowest =
      std::min_element(parked_, parked_ + parked_count_, [](const Group& a, const Group& b) { return a.pc < b.pc; });
  running_ = *lowest;
  *lowest = parked_[--parked_count_];
  return true;
}

// Joins the running group with one that it has met, or gives way to another.
void Warp::settle() {
  for (uint32_t i = 0; i < parked_count_; ++i) {
    if (parked_[i].pc != running_.pc) continue;
    running_.lanes |= parked_[i].lanes;
    parked_[i] = parked_[--parked_count_];
    fair_ = false;
    break;
  }
  if (parked_count_ == 0) {
    fair_ = false;
    return;
  }
  const auto swap_with = [&](Group& other) {
    running_.since = executed_;
    std::swap(running_, other);
  };
  Group* const oldest = std::min_element(parked_, parked_ + parked_count_,
                                         [](const Group& a, const Group& b) { return a.since < b.since; });
  const bool turn_is_over = fair_ && executed_ >= fair_end_;
  if (turn_is_over || (!fair_ && executed_ - oldest->since >= QUANTUM)) {
    swap_with(*oldest);
    fair_ = true;
    fair_end_ = executed_ + QUANTUM;
  } else if (!fair_) {
    Group* const lowest =
        std::min_element(parked_, parked_ + parked_count_, [](const Group& a, const Group& b) { return a.pc < b.pc; });
    if (lowest->pc < running_.pc) swap_with(*lowest);
  }
}

// The operation from which on the running group has to look for another: the lowest of the others', or, in a turn of
// its own, the next one that it can meet.
uint32_t Warp::next_meeting() const {
  uint32_t next = NEVER;
  for (uint32_t i = 0; i < parked_count_; ++i) {
    if (!fair_ || parked_[i].pc > running_.pc) next = std::min(next, parked_[i].pc);
  }
  return next;
}

// Whether an operation that all 32 lanes have come to is for all of them at once: what converge() would find.
bool Warp::takes_whole_warp(const Operation& operation) const {
  if (operation.presence != Presence::MASK) return true;
  const auto* const masks = reinterpret_cast<const uint32_t*>(registers + operation.mask);
  uint32_t all = ~0u;
  for (int lane = 0; lane < LANES; ++lane) all &= masks[lane];
  return all == ~0u;
}

void Warp::run(uint64_t slice) {
  Block& owner = *block;
  const Operation* const operations = owner.program->operations.data();
  OperationCounters* const counters = owner.launch->options.counters ? owner.counters.data() : nullptr;
  const uint64_t budget = owner.launch->options.budget;
  const uint64_t slice_end = executed_ + slice;
  state = State::READY;

  while (true) {
    if (lanes_left_) release();
    if (running_.lanes == 0 && !choose()) {
      if (waiting == 0 || asleep != 0) return;
      force();  // nobody is left who could come
      continue;
    }
    if (executed_ >= slice_end) return;
    if (owner.spent >= budget) {
      current = running_.pc;
      owner.abandon(
          Kind::BUDGET, *this,
          "the block has executed its budget of " + std::to_string(budget) + " instructions; it was here last");
      return;
    }
    settle();
    uint64_t allowed = std::min(slice_end - executed_, budget - owner.spent);
    if (parked_count_ != 0) {
      uint64_t turn_end = fair_end_;
      if (!fair_) {
        turn_end = NEVER + executed_;
        for (uint32_t i = 0; i < parked_count_; ++i) turn_end = std::min(turn_end, parked_[i].since + QUANTUM);
      }
      allowed = std::min(allowed, turn_end - executed_);
    }
    const uint32_t meeting = next_meeting();
    uint32_t at = running_.pc;
    const uint32_t group = running_.lanes;
    const Operation* flow = nullptr;  // the operation that needs more than a look at the next
    uint32_t lanes = 0;
    uint64_t left = allowed;
    while (left != 0 && at < meeting) {
      --left;
      const Operation& operation = operations[at];
      current = at;
      lanes = group;
      if (operation.guard != NO_SLOT) lanes &= predicate(operation.guard) ^ (operation.guard_negated ? ~0u : 0u);
      if (!operation.hidden) {
        ++owner.instructions;
        if (counters != nullptr) {
          ++counters[at].warps;
          counters[at].lanes += lane_count(lanes);
        }
      }
      if (undefined.any()) [[unlikely]] {
        const bool alone = operation.flow != Flow::CONVERGE && operation.flow != Flow::BARRIER;
        if (alone || (lanes == ~0u && takes_whole_warp(operation))) undefined.step(*this, operation, group, lanes);
      }
      if (operation.flow == Flow::NEXT) [[likely]] {
        if (lanes != 0) operation.run(*this, operation, lanes);
        ++at;
      } else if (lanes == 0) {
        ++at;
      } else if (operation.flow == Flow::BRANCH && lanes == group && !fair_) {
        at = operation.target;
      } else if (operation.flow == Flow::CONVERGE && lanes == ~0u && takes_whole_warp(operation)) {
        operation.run(*this, operation, lanes);
        ++at;
      } else {
        flow = &operation;
        break;
      }
    }
    executed_ += allowed - left;
    owner.spent += allowed - left;
    running_.pc = at;
    if (flow != nullptr) {
      if (flow->flow == Flow::CONVERGE || flow->flow == Flow::BARRIER) {
        converge(*flow, at, lanes);
      } else {
        divert(*flow, at, lanes);
      }
      if (owner.abandoned) return;
    }
  }
}

// Branches, calls, returns and exits of `lanes`, which are some or all of the running group.
void Warp::divert(const Operation& operation, uint32_t at, uint32_t lanes) {
  const Program& program = *block->program;
  const uint32_t stay = running_.lanes & ~lanes;
  running_ = {at + 1, stay, executed_};
  uint32_t ways = stay != 0;
  const auto go = [&](uint32_t target, uint32_t some) {
    ++ways;
    if (running_.lanes == 0) {
      running_.pc = target;
      running_.lanes = some;
    } else if (running_.pc == target) {
      running_.lanes |= some;
    } else {
      park(target, some);
    }
  };
  const auto exit = [&](uint32_t some) {
    alive &= ~some;
    lanes_left_ = waiting != 0;
    if (asleep != 0) block->lanes_exited(*this);
  };
  switch (operation.flow) {
    case Flow::BRANCH:
      go(operation.target, lanes);
      break;
    case Flow::BRANCH_INDEXED: {
      const uint32_t* const choice = this->lanes<uint32_t>(operation.slot[0]);
      for (uint32_t rest = lanes; rest != 0;) {
        const uint32_t same = same_as_first(choice, rest);
        const uint32_t value = choice[first_lane(rest)];
        if (value < static_cast<uint64_t>(operation.immediate)) {
          go(program.targets[operation.target + value], same);
        } else {
          find(Kind::ILLEGAL, first_lane(rest), value,
               "index " + std::to_string(value) + " into a list of " + std::to_string(operation.immediate) + " labels");
          exit(same);
        }
        rest &= ~same;
      }
      break;
    }
    case Flow::CALL:
      for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
        std::vector<uint32_t>& stack = calls[first_lane(rest)];
        if (stack.size() >= MAX_CALLS) return block->abandon(Kind::ILLEGAL, *this, "calls nest too deep");
        stack.push_back(at + 1);
      }
      go(operation.target, lanes);
      return;
    case Flow::RETURN: {
      uint32_t target[LANES];
      each(lanes, [&](int lane) {
        target[lane] = NEVER;
        if (calls[lane].empty()) return;
        target[lane] = calls[lane].back();
        calls[lane].pop_back();
      });
      for (uint32_t rest = lanes; rest != 0;) {
        const uint32_t same = same_as_first(target, rest);
        if (target[first_lane(rest)] == NEVER) {
          exit(same);
        } else {
          go(target[first_lane(rest)], same);
        }
        rest &= ~same;
      }
      return;
    }
    case Flow::EXIT:
      return exit(lanes);
    case Flow::TRAP:
      if (operation.run != nullptr) {
        operation.run(*this, operation, lanes);
      } else {
        find(Kind::TRAP, first_lane(lanes), 0, "trap");
      }
      return block->abandon(Kind::TRAP, *this, "");
    default:
      return;
  }
  if (ways > 1 && block->launch->options.counters) ++block->counters[at].diverged;
}

void Warp::wake(uint32_t lanes, uint32_t at) {
  asleep &= ~lanes;
  park(at + 1, lanes);
  if (state == State::SLEEPING) state = State::READY;
}

}  // namespace sparse24::ptx
