// fence and membar, and the instructions that only caches see. Source: PTX ISA, "membar, fence", "prefetch, prefetchu",
// "discard", "applypriority", "createpolicy".
#include "csrc/ptx/block_order.h"
#include "csrc/ptx/execute/access.h"
#include "csrc/ptx/execute/memory_forms.h"

namespace sparse24::ptx {
namespace {

void run_fence(Warp& warp, const Operation& operation, uint32_t) { fence(warp, (operation.option[0] & DEVICE) != 0); }

bool choose_fence(const Chosen& chosen, Operation& operation) {
  operation.run = run_fence;
  operation.option[0] = chosen.has("cta") ? 0 : DEVICE;
  return true;
}

// A hint: addresses that are nobody's do no harm.
void run_hint(Warp&, const Operation&, uint32_t) {}

bool choose_hint(const Chosen&, Operation& operation) {
  operation.run = run_hint;
  return true;
}

bool choose_priority(const Chosen&, Operation& operation) {
  operation.run = run_hint;
  return operation.immediate == 128;
}

// The bytes become indeterminate: nothing is written, but they count as never written from here on.
void discard(Warp& warp, const Operation& operation, uint32_t lanes) {
  constexpr uint64_t LINE = 128, STEP = 32;
  Access line;
  address_lanes(warp, operation, operation.slot[0], 0, lanes, line);
  in_turn(lanes, [&](uint32_t lane) {
    if (line.address[lane] % LINE == 0) return;
    warp.find(Kind::MISALIGNED, lane, line.address[lane], "discard of 128 bytes: its address is not a multiple of 128");
    lanes &= ~(1u << lane);
  });
  for (uint64_t step = 0; step < LINE && lanes != 0; step += STEP) {
    Access access = line;
    access.size = STEP;
    access.intent = Intent::WRITE;
    for (uint64_t& address : access.address) address += step;
    lanes = locate(warp, Space::GLOBAL, lanes, access);
    in_turn(lanes, [&](uint32_t lane) {
      const Allocation* allocation = warp.block->launch->memory.find(access.address[lane]);
      if (allocation->initialized == nullptr) return;
      std::memset(allocation->initialized + (access.address[lane] - allocation->base), 0, STEP);
    });
  }
}

bool choose_discard(const Chosen&, Operation& operation) {
  operation.run = discard;
  return operation.immediate == 128;
}

// A policy is opaque, and only hints read it.
void create_policy(Warp& warp, const Operation& operation, uint32_t lanes) {
  if (operation.slot[0] == NO_SLOT) return;
  uint64_t* const result = warp.lanes<uint64_t>(operation.slot[0]);
  each(lanes, [&](int lane) { result[lane] = 0; });
}

bool choose_policy(const Chosen&, Operation& operation) {
  operation.run = create_policy;
  return true;
}

constexpr Form FORMS[] = {
    {"fence", "sc|acq_rel|acquire|release? cta|cluster|gpu|sys", "", choose_fence},
    {"membar", "cta|gl|sys", "", choose_fence},
    {"prefetch", "global|local? L1|L2", "[a]", choose_hint},
    {"prefetch", "global L2::evict_last|L2::evict_normal", "[a]", choose_hint},
    {"prefetchu", "L1", "[a]", choose_hint},
    {"applypriority", "global? L2::evict_normal", "[a], i", choose_priority},
    {"discard", "global? L2", "[a], i", choose_discard},
    {"createpolicy",
     "fractional L2::evict_last|L2::evict_normal|L2::evict_first|L2::evict_unchanged "
     "L2::evict_first|L2::evict_unchanged? b64",
     "=b64, f32?", choose_policy},
    {"createpolicy",
     "range global? L2::evict_last|L2::evict_normal|L2::evict_first|L2::evict_unchanged "
     "L2::evict_first|L2::evict_unchanged? b64",
     "=b64, [a], u32, u32", choose_policy},
    {"createpolicy", "cvt L2 b64", "=b64, b64", choose_policy},
};

}  // namespace

Forms fence_forms() { return FORMS; }

}  // namespace sparse24::ptx
