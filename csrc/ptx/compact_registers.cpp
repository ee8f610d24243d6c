// Which virtual registers can share a slot: liveness over basic blocks, then one pass that hands out slots.
//
// Registers are private to a lane, and each lane walks the program's paths by itself; so what holds for one thread's
// paths holds for the slots of all lanes, however they diverge. A guarded write keeps the old value alive.
#include <algorithm>
#include <functional>
#include <unordered_map>

#include "csrc/ptx/decoder.h"

namespace sparse24::ptx {
namespace {

using Bits = std::vector<uint64_t>;

bool get(const Bits& bits, uint32_t i) { return (bits[i / 64] >> (i % 64)) & 1; }
void set(Bits& bits, uint32_t i) { bits[i / 64] |= uint64_t{1} << (i % 64); }
void clear(Bits& bits, uint32_t i) { bits[i / 64] &= ~(uint64_t{1} << (i % 64)); }

constexpr uint64_t MAX_BITS = uint64_t{1} << 28, MAX_EDGES = uint64_t{1} << 22;

struct BasicBlock {
  uint32_t first, end;  // operations
  std::vector<uint32_t> next;
  Bits live_in;
};

}  // namespace

void compact_registers(Program& program, const std::vector<std::pair<uint32_t, uint32_t>>& ranges,
                       const std::unordered_map<Slot, uint32_t>& widths) {
  const std::vector<Operation>& operations = program.operations;
  const uint32_t count = static_cast<uint32_t>(operations.size());

  // Registers by number; constants and special registers keep slots of their own, at the front.
  std::unordered_map<Slot, uint32_t> number;
  std::vector<uint32_t> size;  // bytes
  std::unordered_map<Slot, Slot> renamed;
  uint32_t bytes = 0;
  const auto keep = [&](Slot slot, bool wide) {
    renamed[slot] = bytes;
    bytes += wide ? 256 : 128;
  };
  for (const Constant& constant : program.constants) keep(constant.slot, constant.wide);
  for (const SpecialSlot& special : program.specials) keep(special.slot, special.wide);
  const auto number_of = [&](Slot slot) -> int64_t {
    if (slot == NO_SLOT || renamed.contains(slot)) return -1;
    const auto [it, fresh] = number.try_emplace(slot, static_cast<uint32_t>(size.size()));
    if (fresh) size.push_back(widths.at(slot));
    return it->second;
  };
  // Each operation's registers: written, and read (a guarded write reads, for the lanes that keep their value).
  std::vector<std::vector<uint32_t>> writes(count), reads(count);
  for (uint32_t i = 0; i < count; ++i) {
    const Operation& operation = operations[i];
    for (uint32_t s = 0; s < ranges[i].second; ++s) {
      const int64_t one = number_of(program.slots[ranges[i].first + s]);
      if (one < 0) continue;
      const bool result = s < operation.results;
      if (result) writes[i].push_back(static_cast<uint32_t>(one));
      if (!result || operation.guard != NO_SLOT) reads[i].push_back(static_cast<uint32_t>(one));
    }
    for (const Slot slot : {operation.guard, operation.mask}) {
      if (const int64_t one = number_of(slot); one >= 0) reads[i].push_back(static_cast<uint32_t>(one));
    }
  }
  const uint32_t registers = static_cast<uint32_t>(size.size());

  // Basic blocks. A call goes to its function and comes back behind it; a return may go back behind any call.
  std::vector<bool> leader(count + 1, false);
  leader[program.entry] = true;
  std::vector<uint32_t> after_calls;
  for (uint32_t i = 0; i < count; ++i) {
    const Operation& operation = operations[i];
    if (operation.flow == Flow::BRANCH || operation.flow == Flow::CALL) leader[operation.target] = true;
    if (operation.flow == Flow::BRANCH_INDEXED) {
      for (int64_t t = 0; t < operation.immediate; ++t) leader[program.targets[operation.target + t]] = true;
    }
    const bool ends =
        operation.flow != Flow::NEXT && operation.flow != Flow::CONVERGE && operation.flow != Flow::BARRIER;
    if (ends) leader[i + 1] = true;
    if (operation.flow == Flow::CALL) after_calls.push_back(i + 1);
  }
  leader[0] = true;
  // What follows takes a bit a block and register, and an edge a return and call. Beyond any compiler's kernels the
  // registers stay as they are.
  const auto returns = std::ranges::count(operations, Flow::RETURN, &Operation::flow);
  if (std::ranges::count(leader, true) * static_cast<uint64_t>(registers) > MAX_BITS ||
      static_cast<uint64_t>(returns) * after_calls.size() > MAX_EDGES) {
    return;
  }
  std::vector<BasicBlock> blocks;
  std::vector<uint32_t> block_at(count + 1, 0);
  for (uint32_t i = 0; i < count;) {
    uint32_t end = i + 1;
    while (end < count && !leader[end]) ++end;
    for (uint32_t j = i; j < end; ++j) block_at[j] = static_cast<uint32_t>(blocks.size());
    blocks.push_back({i, end, {}, Bits((registers + 63) / 64, 0)});
    i = end;
  }
  for (BasicBlock& block : blocks) {
    const Operation& last = operations[block.end - 1];
    const bool guarded = last.guard != NO_SLOT;
    const auto go = [&](uint32_t operation) {
      if (operation < count) block.next.push_back(block_at[operation]);
    };
    switch (last.flow) {
      case Flow::BRANCH:
      case Flow::CALL:
        go(last.target);
        break;
      case Flow::BRANCH_INDEXED:
        for (int64_t t = 0; t < last.immediate; ++t) go(program.targets[last.target + t]);
        break;
      case Flow::RETURN:
        for (const uint32_t behind : after_calls) go(behind);
        break;
      default:
        break;
    }
    const bool falls = last.flow == Flow::NEXT || last.flow == Flow::CONVERGE || last.flow == Flow::BARRIER;
    if (falls || guarded) go(block.end);
  }

  // Backwards to the fixed point.
  const auto step = [&](Bits& live, uint32_t i) {
    for (const uint32_t one : writes[i]) clear(live, one);
    for (const uint32_t one : reads[i]) set(live, one);
  };
  const auto live_out = [&](const BasicBlock& block) {
    Bits live((registers + 63) / 64, 0);
    for (const uint32_t next : block.next) {
      for (size_t w = 0; w < live.size(); ++w) live[w] |= blocks[next].live_in[w];
    }
    return live;
  };
  for (bool changed = true; changed;) {
    changed = false;
    for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) {
      Bits live = live_out(*block);
      for (uint32_t i = block->end; i-- > block->first;) step(live, i);
      if (live != block->live_in) changed = true, block->live_in = std::move(live);
    }
  }

  // The stretch of the program in which each register is alive: a register gets a slot for all of it.
  std::vector<uint32_t> from(registers, count), to(registers, 0);
  const auto touch = [&](uint32_t one, uint32_t at) {
    from[one] = std::min(from[one], at);
    to[one] = std::max(to[one], at);
  };
  for (const BasicBlock& block : blocks) {
    const Bits out = live_out(block);
    for (uint32_t one = 0; one < registers; ++one) {
      if (get(block.live_in, one)) touch(one, block.first);
      if (get(out, one)) touch(one, block.end - 1);
    }
    for (uint32_t i = block.first; i < block.end; ++i) {
      for (const uint32_t one : writes[i]) touch(one, i);
      for (const uint32_t one : reads[i]) touch(one, i);
    }
  }
  std::vector<uint32_t> order(registers);
  for (uint32_t i = 0; i < registers; ++i) order[i] = i;
  std::ranges::sort(order, {}, [&](uint32_t one) { return std::pair{from[one], one}; });
  std::vector<std::pair<uint32_t, uint32_t>> active;       // last operation, register: a heap by the former
  std::unordered_map<uint32_t, std::vector<Slot>> unused;  // by size
  std::vector<Slot> slot(registers);
  for (const uint32_t one : order) {
    while (!active.empty() && active.front().first < from[one]) {
      const uint32_t done = active.front().second;
      unused[size[done]].push_back(slot[done]);
      std::ranges::pop_heap(active, std::greater{});
      active.pop_back();
    }
    std::vector<Slot>& choice = unused[size[one]];
    if (choice.empty()) {
      slot[one] = bytes;
      bytes += size[one];
    } else {
      slot[one] = choice.back();
      choice.pop_back();
    }
    active.emplace_back(to[one], one);
    std::ranges::push_heap(active, std::greater{});
  }

  const auto rename = [&](Slot& one) {
    if (one == NO_SLOT) return;
    const auto kept = renamed.find(one);
    one = kept != renamed.end() ? kept->second : slot[number.at(one)];
  };
  for (Slot& one : program.slots) rename(one);
  for (Operation& operation : program.operations) {
    rename(operation.guard);
    rename(operation.mask);
  }
  for (Constant& constant : program.constants) rename(constant.slot);
  for (SpecialSlot& special : program.specials) rename(special.slot);
  program.register_bytes = bytes;
}

}  // namespace sparse24::ptx
