// Operations that lanes of a warp execute together: who waits for whom, and what is found where they cannot meet.
#include <algorithm>
#include <string>

#include "csrc/ptx/lane_mask.h"
#include "csrc/ptx/machine.h"

namespace sparse24::ptx {
namespace {

Kind divergence_at(const Operation& operation) {
  return operation.flow == Flow::BARRIER ? Kind::DIVERGENT_BARRIER : Kind::DIVERGENT_INSTRUCTION;
}

}  // namespace

// Of the lanes in `candidates`, all of them at `operation`: a set that goes together, with the first of them. Returns
// the lanes of it if all that it needs are there, else 0; `rest` loses the set either way.
uint32_t Warp::complete_set(const Operation& operation, uint32_t candidates, uint32_t& rest) const {
  uint32_t set = candidates, needed = 0;
  if (operation.presence == Presence::ALIGNED) {
    needed = alive;
  } else if (operation.presence == Presence::MASK) {
    const auto* const masks = reinterpret_cast<const uint32_t*>(registers + operation.mask);
    set = same_as_first(masks, candidates);
    needed = masks[first_lane(candidates)] & alive;
  }
  rest &= ~set;
  return (needed & ~set) == 0 ? set : 0;
}

// The running group has come to an operation that lanes execute together; `lanes` are those whose guard is true. The
// complete sets among them, and among those that wait here, execute it; the others wait.
void Warp::converge(const Operation& operation, uint32_t at, uint32_t lanes) {
  const uint32_t group = running_.lanes;
  uint32_t here = lanes;
  for (uint32_t rest = waiting; rest != 0; rest &= rest - 1) {
    if (pc[first_lane(rest)] == at) here |= rest & -rest;
  }
  running_ = {at + 1, group & ~lanes, executed_};
  // What needs the whole warp may be under a guard that is not the same for all: the others do not come.
  const bool split = operation.presence == Presence::ALIGNED && running_.lanes != 0;
  if (split) {
    find_with(divergence_at(operation), first_lane(running_.lanes), 0, [&] {
      return "the guard predicate is true for lanes " + in_hex(lanes) +
             " only, but all lanes of the warp have to execute it";
    });
  }
  uint32_t executed = 0;
  for (uint32_t rest = here; rest != 0;) {
    uint32_t left = rest;
    const uint32_t complete = complete_set(operation, rest, left);
    const uint32_t set = split ? rest : complete;
    rest = left;
    if (set == 0) continue;
    waiting &= ~set;
    executed |= set;
    execute_together(operation, at, set);
    if (block->abandoned) return;
  }
  const uint32_t wait = here & ~executed;
  // The loop has counted this arrival; an execution counts once, when it takes place.
  if (executed == 0) --block->instructions;
  if (block->launch->options.counters) {
    OperationCounters& counters = block->counters[at];
    counters.lanes += lane_count(executed & ~lanes);
    counters.lanes -= lane_count(wait & lanes);
    if (executed == 0) --counters.warps;
  }
  each(wait & lanes, [&](int lane) { pc[lane] = at; });
  waiting |= wait;
}

// What is wrong with a set of lanes that is about to execute, whatever it executes. PTX ISA: a lane that its own
// membermask leaves out, and the tensor cores' instructions in a warp that has lost threads, are undefined.
void Warp::check_set(const Operation& operation, uint32_t lanes) {
  if (operation.presence == Presence::MASK) {
    const uint32_t mask = this->lanes<uint32_t>(operation.mask)[first_lane(lanes)];
    if ((lanes & ~mask) != 0) {
      find_with(Kind::WRONG_MASK, first_lane(lanes & ~mask), 0, [&] {
        return mask == 0 ? std::string("the member mask is empty")
                         : "lanes " + in_hex(lanes & ~mask) + " execute with the member mask " + in_hex(mask) +
                               ", which leaves them out";
      });
    }
  } else if (operation.presence == Presence::ALIGNED && operation.flow == Flow::CONVERGE && alive != ~0u) {
    find_with(Kind::EXITED_LANE, first_lane(~alive), 0, [&] {
      return started == ~0u ? "lanes " + in_hex(~alive) + " have exited, but the whole warp has to execute it"
                            : "the warp has threads in lanes " + in_hex(alive) + " only, but all 32 have to execute it";
    });
  }
}

// Executes the operation for lanes that do so at once, and lets them go on.
void Warp::execute_together(const Operation& operation, uint32_t at, uint32_t lanes) {
  current = at;
  check_set(operation, lanes);
  if (operation.flow == Flow::BARRIER) each(lanes, [&](int lane) { pc[lane] = at; });
  if (undefined.any()) undefined.step(*this, operation, lanes, lanes);
  operation.run(*this, operation, lanes);
  if (block->abandoned) return;
  // The handler of a barrier of the block takes the lanes: they sleep, or have been woken and are parked already.
  if (operation.flow == Flow::BARRIER && operation.presence != Presence::MASK) return;
  if (running_.lanes == 0 || running_.pc == at + 1) {
    running_ = {at + 1, running_.lanes | lanes, executed_};
  } else {
    park(at + 1, lanes);
  }
}

// Lanes have exited: sets that waited for them may be complete.
void Warp::release() {
  lanes_left_ = false;
  for (uint32_t rest = waiting; rest != 0;) {
    const uint32_t at = pc[first_lane(rest)];
    const uint32_t here = same_as_first(pc, rest);
    rest &= ~here;
    const Operation& operation = block->program->operations[at];
    for (uint32_t candidates = here; candidates != 0;) {
      uint32_t left = candidates;
      const uint32_t set = complete_set(operation, candidates, left);
      candidates = left;
      if (set == 0) continue;
      waiting &= ~set;
      count_execution(at, set);
      execute_together(operation, at, set);
      if (block->abandoned) return;
    }
  }
}

// The lanes that wait at one operation and go together, with the lowest of them. `needed`: all that they wait for.
uint32_t Warp::waiting_set(uint32_t at, uint32_t& needed) {
  uint32_t set = lanes_where(waiting, [&](int lane) { return pc[lane] == at; });
  needed = alive;
  const Operation& operation = block->program->operations[at];
  if (set != 0 && operation.presence == Presence::MASK) {
    const uint32_t* const masks = lanes<uint32_t>(operation.mask);
    set = same_as_first(masks, set);
    needed = masks[first_lane(set)] & alive;
  }
  return set;
}

void Warp::force() {
  const std::vector<Operation>& operations = block->program->operations;
  // The lowest first: when its lanes go on, they may come to where the others wait.
  uint32_t at = ~0u;
  each(waiting, [&](int lane) { at = std::min(at, pc[lane]); });
  uint32_t needed = 0;
  const uint32_t set = waiting_set(at, needed), missing = needed & ~set;
  const Operation& operation = operations[at];
  // Of the lanes that are missing: those that came here with another mask, and those at barriers of the block.
  const uint32_t same_place = lanes_where(missing & waiting, [&](int lane) { return pc[lane] == at; });
  const uint32_t at_barriers = lanes_where(missing & waiting, [&](int lane) {
    const Operation& other = operations[pc[lane]];
    return other.flow == Flow::BARRIER && other.presence == Presence::ALIGNED;
  });
  current = at;
  if (same_place != 0) {
    const uint32_t* const masks = lanes<uint32_t>(operation.mask);
    find_with(Kind::WRONG_MASK, first_lane(set), 0, [&] {
      return "lanes " + in_hex(set) + " came with the member mask " + in_hex(masks[first_lane(set)]) + ", lane " +
             std::to_string(first_lane(same_place)) + " of it with the mask " + in_hex(masks[first_lane(same_place)]);
    });
  } else if (missing != 0) {
    find_with(divergence_at(operation), first_lane(set), 0, [&] {
      return "lanes " + in_hex(set) + " wait here for lanes " + in_hex(missing) + ", of which lane " +
             std::to_string(first_lane(missing)) + " waits at line " +
             std::to_string(block->line_of(pc[first_lane(missing)]));
    });
  }
  state = State::READY;
  if (operation.flow == Flow::BARRIER && operation.presence == Presence::ALIGNED && at_barriers == missing) {
    // Some are at one barrier instruction, some at another: the warp arrives when the last of them has.
    split_arrival = true;
    while (waiting != 0 && !block->abandoned) force_set(pc[first_lane(waiting)]);
    split_arrival = false;
    return;
  }
  force_set(at);
  // Those that disagree about the mask go at once, before any of them can exit.
  each(same_place, [&](int lane) {
    if ((waiting >> lane & 1) != 0 && !block->abandoned) force_set(at);
  });
}

void Warp::force_set(uint32_t at) {
  uint32_t needed = 0;
  const uint32_t set = waiting_set(at, needed);
  waiting &= ~set;
  count_execution(at, set);
  execute_together(block->program->operations[at], at, set);
}

void Warp::count_execution(uint32_t at, uint32_t lanes) {
  ++block->instructions;
  if (!block->launch->options.counters) return;
  ++block->counters[at].warps;
  block->counters[at].lanes += lane_count(lanes);
}

}  // namespace sparse24::ptx
