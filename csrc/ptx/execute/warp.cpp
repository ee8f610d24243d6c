// Instructions by which the lanes of a warp exchange values: shfl, vote, match, redux, activemask, elect.
//
// They come here when all lanes that have to are there (warp.cpp): `lanes` is the set that executes them at once.
#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <string>

#include "csrc/ptx/execute/barrier.h"
#include "csrc/ptx/execute/runtime.h"
#include "csrc/ptx/isa.h"
#include "csrc/ptx/lane_mask.h"
#include "csrc/ptx/machine.h"

namespace sparse24::ptx {
namespace {

constexpr uint32_t UNDEFINED = 0xcdcdcdcd;  // what a shuffle reads from a lane that takes no part
constexpr uint32_t CANONICAL_NAN = 0x7fffffff;

uint32_t mask_of(Warp& warp, const Operation& operation, uint32_t lanes) {
  return warp.lanes<uint32_t>(operation.mask)[first_lane(lanes)];
}

void set_predicate(Warp& warp, Slot slot, uint32_t lanes, uint32_t values) {
  if (slot == NO_SLOT) return;
  uint32_t& predicate = warp.predicate(slot);
  predicate = (predicate & ~lanes) | (values & lanes);
}

void set_all(Warp& warp, Slot slot, uint32_t lanes, uint32_t value) {
  if (slot == NO_SLOT) return;
  uint32_t* const result = warp.lanes<uint32_t>(slot);
  each(lanes, [&](int lane) { result[lane] = value; });
}

// ---- shfl.sync
// -------------------------------------------------------------------------------------------------------

enum class Shuffle : uint8_t { UP, DOWN, BUTTERFLY, INDEX };

// A lane's source: PTX ISA, shfl.sync, "Semantics". Returns whether it is in range.
template <Shuffle MODE>
bool source_of(int lane, uint32_t b, uint32_t c, int& source) {
  const int offset = static_cast<int>(b & 31), clamp = static_cast<int>(c & 31),
            segment = static_cast<int>(c >> 8 & 31);
  const int lowest = lane & segment;
  const int highest = lowest | (clamp & ~segment);
  if constexpr (MODE == Shuffle::UP) {
    source = lane - offset;
    return source >= highest;
  } else {
    if constexpr (MODE == Shuffle::DOWN) source = lane + offset;
    if constexpr (MODE == Shuffle::BUTTERFLY) source = lane ^ offset;
    if constexpr (MODE == Shuffle::INDEX) source = lowest | (offset & ~segment);
    return source <= highest;
  }
}

void find_absent_source(Warp& warp, uint32_t lane, uint32_t source, uint32_t mask) {
  const bool in_mask = (mask >> source & 1) != 0;
  warp.find_with(in_mask ? Kind::EXITED_LANE : Kind::WRONG_MASK, lane, 0, [&] {
    const bool exists = (warp.started >> source & 1) != 0;
    const char* const why = !in_mask ? "is not in the member mask"
                            : exists ? "has exited or is elsewhere"
                                     : "has no thread";
    return "lane " + std::to_string(lane) + " reads the register of lane " + std::to_string(source) + ", which " + why;
  });
}

template <Shuffle MODE>
void shuffle(Warp& warp, const Operation& operation, uint32_t lanes) {
  uint32_t values[LANES];
  std::memcpy(values, warp.lanes<uint32_t>(operation.slot[2]), sizeof values);
  const uint32_t* const b = warp.lanes<uint32_t>(operation.slot[3]);
  const uint32_t* const c = warp.lanes<uint32_t>(operation.slot[4]);
  const uint32_t mask = mask_of(warp, operation, lanes);
  uint32_t result[LANES], in_range = 0;
  each(lanes, [&](int lane) {
    int source = lane;
    if (source_of<MODE>(lane, b[lane], c[lane], source)) {
      in_range |= 1u << lane;
    } else {
      source = lane;
    }
    result[lane] = values[source & 31];
    if (lanes == ~0u && mask == ~0u) return;
    if ((lanes & mask & 1u << source) == 0 && source != lane) {
      find_absent_source(warp, static_cast<uint32_t>(lane), static_cast<uint32_t>(source), mask);
      result[lane] = UNDEFINED;
    }
  });
  if (operation.slot[0] != NO_SLOT) {
    uint32_t* const d = warp.lanes<uint32_t>(operation.slot[0]);
    each(lanes, [&](int lane) { d[lane] = result[lane]; });
  }
  set_predicate(warp, operation.slot[1], lanes, in_range);
}

bool choose_shuffle(const Chosen& chosen, Operation& operation) {
  static constexpr Handler HANDLERS[] = {shuffle<Shuffle::UP>, shuffle<Shuffle::DOWN>, shuffle<Shuffle::BUTTERFLY>,
                                         shuffle<Shuffle::INDEX>};
  operation.run = HANDLERS[chosen.one_of({"up", "down", "bfly", "idx"}, 0)];
  operation.flow = Flow::CONVERGE;
  return true;
}

// ---- vote.sync
// -------------------------------------------------------------------------------------------------------

enum class Vote : uint8_t { ALL, ANY, UNIFORM, BALLOT };

template <Vote MODE>
void vote(Warp& warp, const Operation& operation, uint32_t lanes) {
  const uint32_t voters = lanes & mask_of(warp, operation, lanes);
  const uint32_t ballot = warp.predicate(operation.slot[1]) & voters;
  if constexpr (MODE == Vote::BALLOT) {
    set_all(warp, operation.slot[0], lanes, ballot);
  } else {
    const bool all = ballot == voters, any = ballot != 0;
    const bool result = MODE == Vote::ALL ? all : MODE == Vote::ANY ? any : all || !any;
    set_predicate(warp, operation.slot[0], lanes, result ? ~0u : 0u);
  }
}

bool choose_vote(const Chosen& chosen, Operation& operation) {
  static constexpr Handler HANDLERS[] = {vote<Vote::ALL>, vote<Vote::ANY>, vote<Vote::UNIFORM>};
  operation.run = HANDLERS[chosen.one_of({"all", "any", "uni"}, 0)];
  operation.flow = Flow::CONVERGE;
  return true;
}

bool choose_ballot(const Chosen&, Operation& operation) {
  operation.run = vote<Vote::BALLOT>;
  operation.flow = Flow::CONVERGE;
  return true;
}

// ---- match.sync
// ------------------------------------------------------------------------------------------------------

template <class T>
void match_any(Warp& warp, const Operation& operation, uint32_t lanes) {
  const uint32_t members = lanes & mask_of(warp, operation, lanes);
  const T* const values = warp.lanes<T>(operation.slot[1]);
  uint32_t result[LANES];
  for (uint32_t rest = lanes; rest != 0;) {
    const T value = values[first_lane(rest)];
    const uint32_t same = lanes_where(lanes, [&](int lane) { return values[lane] == value; });
    each(same, [&](int lane) { result[lane] = same & members; });
    rest &= ~same;
  }
  if (operation.slot[0] == NO_SLOT) return;
  uint32_t* const d = warp.lanes<uint32_t>(operation.slot[0]);
  each(lanes, [&](int lane) { d[lane] = result[lane]; });
}

template <class T>
void match_all(Warp& warp, const Operation& operation, uint32_t lanes) {
  const uint32_t members = lanes & mask_of(warp, operation, lanes);
  const T* const values = warp.lanes<T>(operation.slot[2]);
  bool equal = true;
  each(lanes, [&](int lane) { equal = equal && values[lane] == values[first_lane(lanes)]; });
  set_all(warp, operation.slot[0], lanes, equal ? members : 0);
  set_predicate(warp, operation.slot[1], lanes, equal ? ~0u : 0u);
}

bool choose_match_any(const Chosen& chosen, Operation& operation) {
  operation.run = bits_of(chosen.type()) == 64 ? match_any<uint64_t> : match_any<uint32_t>;
  operation.flow = Flow::CONVERGE;
  return true;
}

bool choose_match_all(const Chosen& chosen, Operation& operation) {
  operation.run = bits_of(chosen.type()) == 64 ? match_all<uint64_t> : match_all<uint32_t>;
  operation.flow = Flow::CONVERGE;
  return true;
}

// ---- redux.sync
// ------------------------------------------------------------------------------------------------------

template <auto F, class T>
void redux(Warp& warp, const Operation& operation, uint32_t lanes) {
  const T* const values = warp.lanes<T>(operation.slot[1]);
  T result = values[first_lane(lanes)];
  each(lanes & (lanes - 1), [&](int lane) { result = F(result, values[lane]); });
  set_all(warp, operation.slot[0], lanes, static_cast<uint32_t>(result));
}

uint32_t sum(uint32_t a, uint32_t b) { return a + b; }
template <class T>
T least(T a, T b) {
  return std::min(a, b);
}
template <class T>
T greatest(T a, T b) {
  return std::max(a, b);
}
uint32_t conjunction(uint32_t a, uint32_t b) { return a & b; }
uint32_t disjunction(uint32_t a, uint32_t b) { return a | b; }
uint32_t difference(uint32_t a, uint32_t b) { return a ^ b; }

// option[0]: .abs, option[1]: .NaN
template <bool MAXIMUM>
void redux_float(Warp& warp, const Operation& operation, uint32_t lanes) {
  const uint32_t* const values = warp.lanes<uint32_t>(operation.slot[1]);
  // As integers in the order of the values, -0.0 below +0.0.
  const auto key = [](uint32_t bits) { return static_cast<int32_t>(bits >> 31 != 0 ? bits ^ 0x7fffffff : bits); };
  uint32_t result = CANONICAL_NAN;
  bool found = false, nan = false;
  each(lanes, [&](int lane) {
    const uint32_t bits = operation.option[0] != 0 ? values[lane] & 0x7fffffff : values[lane];
    if ((bits & 0x7fffffff) > 0x7f800000) {
      nan = true;
    } else if (!found || (MAXIMUM ? key(bits) > key(result) : key(bits) < key(result))) {
      result = bits;
      found = true;
    }
  });
  set_all(warp, operation.slot[0], lanes, nan && operation.option[1] != 0 ? CANONICAL_NAN : result);
}

bool choose_redux(const Chosen& chosen, Operation& operation) {
  operation.flow = Flow::CONVERGE;
  const int which = chosen.one_of({"min", "max"}, -1);
  if (which < 0) {
    operation.run = redux<sum, uint32_t>;
  } else if (chosen.type() == Type::S32) {
    operation.run = which == 0 ? redux<least<int32_t>, int32_t> : redux<greatest<int32_t>, int32_t>;
  } else {
    operation.run = which == 0 ? redux<least<uint32_t>, uint32_t> : redux<greatest<uint32_t>, uint32_t>;
  }
  return true;
}

bool choose_redux_bits(const Chosen& chosen, Operation& operation) {
  static constexpr Handler HANDLERS[] = {redux<conjunction, uint32_t>, redux<disjunction, uint32_t>,
                                         redux<difference, uint32_t>};
  operation.flow = Flow::CONVERGE;
  operation.run = HANDLERS[chosen.one_of({"and", "or", "xor"}, 0)];
  return true;
}

bool choose_redux_float(const Chosen& chosen, Operation& operation) {
  operation.flow = Flow::CONVERGE;
  operation.option[0] = chosen.has("abs");
  operation.option[1] = chosen.has("NaN");
  operation.run = chosen.has("max") ? redux_float<true> : redux_float<false>;
  return true;
}

// ---- activemask, elect.sync
// ------------------------------------------------------------------------------------------

void active_mask(Warp& warp, const Operation& operation, uint32_t lanes) {
  set_all(warp, operation.slot[0], lanes, lanes);
}

bool choose_active_mask(const Chosen&, Operation& operation) {
  operation.run = active_mask;
  return true;
}

// Which lane is elected is left open but for that it is always the same one: the lowest.
void elect(Warp& warp, const Operation& operation, uint32_t lanes) {
  find_exited_members(warp, operation, lanes);
  const uint32_t leader = first_lane(lanes);
  set_all(warp, operation.slot[0], lanes, leader);
  set_predicate(warp, operation.slot[1], lanes, 1u << leader);
}

bool choose_elect(const Chosen&, Operation& operation) {
  operation.run = elect;
  operation.flow = Flow::CONVERGE;
  return true;
}

constexpr Form FORMS[] = {
    {"shfl", "sync up|down|bfly|idx b32", "=b32|p?, b32, u32, u32, m", choose_shuffle},
    {"vote", "sync all|any|uni pred", "=p, !p, m", choose_vote},
    {"vote", "sync ballot b32", "=b32, !p, m", choose_ballot},
    {"match", "any sync b32|b64", "=b32, 0, m", choose_match_any},
    {"match", "all sync b32|b64", "=b32|p?, 0, m", choose_match_all},
    {"redux", "sync add|min|max u32|s32", "=0, 0, m", choose_redux},
    {"redux", "sync and|or|xor b32", "=0, 0, m", choose_redux_bits},
    {"redux", "sync min|max abs? NaN? f32", "=0, 0, m", choose_redux_float},
    {"activemask", "b32", "=b32", choose_active_mask},
    {"elect", "sync", "=b32|p?, m", choose_elect},
};

}  // namespace

Forms warp_forms() {
  static const std::vector<Form> forms = [] {
    std::vector<Form> all(std::begin(FORMS), std::end(FORMS));
    const Forms barriers = barrier_forms();
    const Forms runtime = runtime_forms();
    all.insert(all.end(), barriers.begin(), barriers.end());
    all.insert(all.end(), runtime.begin(), runtime.end());
    return all;
  }();
  return forms;
}

}  // namespace sparse24::ptx
