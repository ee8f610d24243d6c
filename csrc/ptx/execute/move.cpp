// Moves between registers, and addresses between spaces. Source: PTX ISA, mov, cvta, isspacep.
#include "csrc/ptx/execute/family.h"
#include "csrc/ptx/execute/lanes.h"

namespace sparse24::ptx {
namespace {

constexpr auto same = []<class T>(T a) { return a; };

void move_predicate(Warp& warp, const Operation& operation, uint32_t lanes) {
  write_predicate(warp, operation.slot[0], lanes, warp.predicate(operation.slot[1]));
}

// The unsigned integer of a size in bits.
template <int BITS>
using Word =
    std::conditional_t<BITS == 8, uint8_t,
                       std::conditional_t<BITS == 16, uint16_t, std::conditional_t<BITS == 32, uint32_t, uint64_t>>>;

// d = {a, b, ...}: the first part lies lowest.
template <int BITS, int PARTS>
void pack(Warp& warp, const Operation& operation, uint32_t lanes) {
  using Part = Word<BITS / PARTS>;
  Cell<Word<BITS>>* const d = warp.lanes<Cell<Word<BITS>>>(operation.slot[0]);
  const uint32_t* parts[PARTS];
  for (int i = 0; i < PARTS; ++i) parts[i] = warp.lanes<uint32_t>(operation.slot[1 + i]);
  each_alone(lanes, [&](int lane) {
    Word<BITS> whole = 0;
    for (int i = 0; i < PARTS; ++i) {
      whole |=
          static_cast<Word<BITS>>(static_cast<Word<BITS>>(static_cast<Part>(parts[i][lane])) << (i * BITS / PARTS));
    }
    d[lane] = whole;
  });
}

// {a, b, ...} = s, or some of them.
template <int BITS, int PARTS>
void unpack(Warp& warp, const Operation& operation, uint32_t lanes) {
  using Part = Word<BITS / PARTS>;
  const Cell<Word<BITS>>* const s = warp.lanes<Cell<Word<BITS>>>(operation.slot[PARTS]);
  uint32_t unused[LANES];
  uint32_t* parts[PARTS];
  for (int i = 0; i < PARTS; ++i) {
    parts[i] = operation.slot[i] == NO_SLOT ? unused : warp.lanes<uint32_t>(operation.slot[i]);
  }
  each_alone(lanes, [&](int lane) {
    const Word<BITS> whole = static_cast<Word<BITS>>(s[lane]);
    for (int i = 0; i < PARTS; ++i) parts[i][lane] = static_cast<Part>(whole >> (i * BITS / PARTS));
  });
}

template <int BITS, int PARTS>
constexpr Handler PACKING[2] = {pack<BITS, PARTS>, unpack<BITS, PARTS>};

bool choose_packing(int bits, int parts, bool unpacks, Operation& operation) {
  struct Shape {
    int bits, parts;
    const Handler* handlers;
  };
  static constexpr Shape SHAPES[] = {{16, 2, PACKING<16, 2>},
                                     {32, 2, PACKING<32, 2>},
                                     {32, 4, PACKING<32, 4>},
                                     {64, 2, PACKING<64, 2>},
                                     {64, 4, PACKING<64, 4>}};
  for (const Shape& shape : SHAPES) {
    if (shape.bits == bits && shape.parts == parts) operation.run = shape.handlers[unpacks];
  }
  return operation.run != nullptr;
}

bool choose_pack(const Chosen& chosen, Operation& operation) {
  for (int i = 0; i < operation.count[1]; ++i) {
    if (operation.slot[1 + i] == NO_SLOT) return false;
  }
  return choose_packing(bits_of(chosen.type()), operation.count[1], false, operation);
}

bool choose_unpack(const Chosen& chosen, Operation& operation) {
  return choose_packing(bits_of(chosen.type()), operation.count[0], true, operation);
}

// ---- addresses ----

// The first generic address of a space. Global and const addresses are generic ones as they are: 0.
uint64_t window_of(Space space) {
  switch (space) {
    case Space::SHARED:
      return SHARED_WINDOW;
    case Space::LOCAL:
      return LOCAL_WINDOW;
    case Space::PARAM:
      return PARAM_WINDOW;
    default:
      return 0;
  }
}

bool in_window(uint64_t address, uint64_t window) { return address - window < WINDOW_BYTES; }

void to_generic(Warp& warp, const Operation& operation, uint32_t lanes) {
  uint64_t* const d = warp.lanes<uint64_t>(operation.slot[0]);
  const uint64_t* const a = warp.lanes<uint64_t>(operation.slot[1]);
  const uint64_t window = window_of(operation.space);
  each_alone(lanes, [&](int lane) { d[lane] = a[lane] + window; });
}

// An address outside the window has no address in the space. It becomes one that no access can use, not even after it
// is cut to 32 bits, as shared addresses are.
constexpr uint64_t NOWHERE = 0x80000000'80000000;

void from_generic(Warp& warp, const Operation& operation, uint32_t lanes) {
  uint64_t* const d = warp.lanes<uint64_t>(operation.slot[0]);
  const uint64_t* const a = warp.lanes<uint64_t>(operation.slot[1]);
  const uint64_t window = window_of(operation.space);
  each_alone(lanes, [&](int lane) { d[lane] = in_window(a[lane], window) ? a[lane] - window : NOWHERE; });
}

bool choose_cvta(const Chosen& chosen, Operation& operation) {
  if (window_of(operation.space) == 0) {
    operation.run = lanewise<same, uint64_t, uint64_t>;
  } else {
    operation.run = chosen.has("to") ? from_generic : to_generic;
  }
  return true;
}

// Whatever is in no other space is global; kernel parameters are in .global as well (PTX ISA, isspacep).
bool is_in(Launch& launch, uint64_t address, Space space) {
  if (const uint64_t window = window_of(space); window != 0) return in_window(address, window);
  const Allocation* const allocation = launch.memory.find(address);
  const bool is_const =
      allocation && allocation->live && allocation->read_only && address - allocation->base < allocation->size;
  if (space == Space::CONST) return is_const;
  return !is_const && !in_window(address, SHARED_WINDOW) && !in_window(address, LOCAL_WINDOW);
}

void is_space(Warp& warp, const Operation& operation, uint32_t lanes) {
  const uint64_t* const a = warp.lanes<uint64_t>(operation.slot[1]);
  write_predicate(warp, operation.slot[0], lanes,
                  lanes_where(lanes, [&](int lane) { return is_in(*warp.block->launch, a[lane], operation.space); }));
}

constexpr Form MOVES[] = {
    {"mov", "b16|b32|b64|u16|u32|u64|s16|s32|s64|f32|f64", "=0, 0", by_width<same, 1>},
    {"mov", "pred", "=p, !p", always<move_predicate>},
    {"mov", "b16|b32|b64", "=0, *0", choose_pack},
    {"mov", "b16|b32|b64", "=*0, 0", choose_unpack},
    {"cvta", "const|global|local|shared|shared::cta|shared::cluster|param|param::entry u64", "=u64, u64", choose_cvta},
    {"cvta", "to const|global|local|shared|shared::cta|shared::cluster|param|param::entry u64", "=u64, u64",
     choose_cvta},
    {"isspacep", "const|global|local|shared|shared::cta|shared::cluster|param|param::entry", "=p, u64",
     always<is_space>},
};

}  // namespace

Forms move_forms() {
  static const std::vector<Form> forms = join({MOVES, comparison_forms()});
  return forms;
}

}  // namespace sparse24::ptx
