// Comparison and selection. Source: PTX ISA, "Comparison and Selection Instructions", "Half Precision Comparison
// Instructions", and the tables of comparison operators.
#include <cfloat>
#include <cmath>

#include "csrc/ptx/execute/family.h"
#include "csrc/ptx/execute/lanes.h"

namespace sparse24::ptx {
namespace {

enum Option { COMPARISON, BOOLEAN };  // indices of Operation::option
// The unsigned lo, ls, hi, hs are LT, LE, GT, GE.
enum Comparison : uint8_t { EQ, NE, LT, LE, GT, GE, EQU, NEU, LTU, LEU, GTU, GEU, NUM, NOT_A_NUMBER };
enum Boolean : uint8_t { NONE, AND, OR, XOR };

// ---- what is compared: cells as numbers ----

template <class T>
constexpr auto number = [](Cell<T> cell) { return from_cell<T>(cell); };

constexpr auto flushed_f32 = [](uint32_t cell) {
  const float value = from_cell<float>(cell);
  return std::fabs(value) < FLT_MIN ? 0.0f : value;
};

struct F16 {
  static constexpr uint32_t INFINITE = 0x7c00, SMALLEST_NORMAL = 0x0400;
};
struct BF16 {
  static constexpr uint32_t INFINITE = 0x7f80, SMALLEST_NORMAL = 0x0080;
};

// A 16-bit float by its rank among them all, which compares as it does: NaN stays NaN, the two zeros are equal.
template <class Format, int SHIFT, bool FLUSH>
constexpr auto half = [](uint32_t cell) {
  const uint32_t magnitude = (cell >> SHIFT) & 0x7fff;
  const bool negative = (cell >> SHIFT) & 0x8000;
  const float rank =
      FLUSH && magnitude < Format::SMALLEST_NORMAL ? 0.0f : static_cast<float>(static_cast<int>(magnitude));
  return magnitude > Format::INFINITE ? NAN : negative ? -rank : rank;
};

// ---- comparing ----

// The lanes for which a CmpOp b. READ makes a number of a cell of type C.
template <auto READ, class C>
uint32_t compare(uint8_t comparison, Warp& warp, const Slot* sources, uint32_t lanes) {
  const C* const a = warp.lanes<C>(sources[0]);
  const C* const b = warp.lanes<C>(sources[1]);
  const auto where = [&](auto holds) {
    return lanes_where(lanes, [&](int lane) { return holds(READ(a[lane]), READ(b[lane])); });
  };
  switch (comparison) {
    case EQ:
      return where([](auto x, auto y) { return x == y; });
    case NE:
      return where([](auto x, auto y) { return x < y || x > y; });
    case LT:
      return where([](auto x, auto y) { return x < y; });
    case LE:
      return where([](auto x, auto y) { return x <= y; });
    case GT:
      return where([](auto x, auto y) { return x > y; });
    case GE:
      return where([](auto x, auto y) { return x >= y; });
    case EQU:
      return where([](auto x, auto y) { return !(x < y || x > y); });
    case NEU:
      return where([](auto x, auto y) { return x != y; });
    case LTU:
      return where([](auto x, auto y) { return !(x >= y); });
    case LEU:
      return where([](auto x, auto y) { return !(x > y); });
    case GTU:
      return where([](auto x, auto y) { return !(x <= y); });
    case GEU:
      return where([](auto x, auto y) { return !(x < y); });
    case NUM:
      return where([](auto x, auto y) { return x <= y || x > y; });
    default:
      return where([](auto x, auto y) { return !(x <= y || x > y); });
  }
}

uint32_t combine(const Operation& operation, uint32_t truth, Warp& warp, Slot with) {
  switch (operation.option[BOOLEAN]) {
    case AND:
      return truth & warp.predicate(with);
    case OR:
      return truth | warp.predicate(with);
    case XOR:
      return truth ^ warp.predicate(with);
    default:
      return truth;
  }
}

// Slots: p, q, a, b, c. COMPARE is a compare(), of the high half of a pair HIGH.
template <auto COMPARE>
void setp(Warp& warp, const Operation& operation, uint32_t lanes) {
  const Slot* const slot = operation.slot;
  const uint32_t truth = COMPARE(operation.option[COMPARISON], warp, slot + 2, lanes);
  const uint32_t p = combine(operation, truth, warp, slot[4]), q = combine(operation, ~truth, warp, slot[4]);
  write_predicate(warp, slot[0], lanes, p);
  write_predicate(warp, slot[1], lanes, q);
}

template <auto COMPARE, auto HIGH>
void setp_pair(Warp& warp, const Operation& operation, uint32_t lanes) {
  const Slot* const slot = operation.slot;
  const uint32_t low = COMPARE(operation.option[COMPARISON], warp, slot + 2, lanes);
  const uint32_t high = HIGH(operation.option[COMPARISON], warp, slot + 2, lanes);
  const uint32_t p = combine(operation, low, warp, slot[4]), q = combine(operation, high, warp, slot[4]);
  write_predicate(warp, slot[0], lanes, p);
  write_predicate(warp, slot[1], lanes, q);
}

// Slots: d, a, b, c. Operation::immediate is what d is where the result is true.
template <auto COMPARE>
void set(Warp& warp, const Operation& operation, uint32_t lanes) {
  const Slot* const slot = operation.slot;
  const uint32_t truth =
      combine(operation, COMPARE(operation.option[COMPARISON], warp, slot + 1, lanes), warp, slot[3]);
  uint32_t* const d = warp.lanes<uint32_t>(slot[0]);
  const uint32_t one = static_cast<uint32_t>(operation.immediate);
  each_alone(lanes, [&](int lane) { d[lane] = truth & LANE_BIT[static_cast<size_t>(lane)] ? one : 0; });
}

template <auto COMPARE, auto HIGH>
void set_pair(Warp& warp, const Operation& operation, uint32_t lanes) {
  const Slot* const slot = operation.slot;
  const uint32_t low = combine(operation, COMPARE(operation.option[COMPARISON], warp, slot + 1, lanes), warp, slot[3]);
  const uint32_t high = combine(operation, HIGH(operation.option[COMPARISON], warp, slot + 1, lanes), warp, slot[3]);
  uint32_t* const d = warp.lanes<uint32_t>(slot[0]);
  const uint32_t one = static_cast<uint32_t>(operation.immediate);
  each_alone(lanes, [&](int lane) {
    const uint32_t bit = LANE_BIT[static_cast<size_t>(lane)];
    d[lane] = (low & bit ? one : 0) | (high & bit ? one << 16 : 0);
  });
}

// ---- choosing ----

struct Setp {
  template <auto COMPARE>
  static constexpr Handler one = setp<COMPARE>;
  template <auto COMPARE, auto HIGH>
  static constexpr Handler pair = setp_pair<COMPARE, HIGH>;
};
struct Set {
  template <auto COMPARE>
  static constexpr Handler one = set<COMPARE>;
  template <auto COMPARE, auto HIGH>
  static constexpr Handler pair = set_pair<COMPARE, HIGH>;
};

template <class Instruction, class T>
Handler of_number() {
  return Instruction::template one<compare<number<T>, Cell<T>>>;
}
template <class Instruction, class Format, bool FLUSH>
Handler of_half(bool pair) {
  if (!pair) return Instruction::template one<compare<half<Format, 0, FLUSH>, uint32_t>>;
  return Instruction::template pair<compare<half<Format, 0, FLUSH>, uint32_t>,
                                    compare<half<Format, 16, FLUSH>, uint32_t>>;
}

template <class Instruction>
Handler handler_for(Type type, bool flush) {
  switch (type) {
    case Type::S16:
      return of_number<Instruction, int16_t>();
    case Type::S32:
      return of_number<Instruction, int32_t>();
    case Type::S64:
      return of_number<Instruction, int64_t>();
    case Type::F16:
    case Type::F16X2:
      return flush ? of_half<Instruction, F16, true>(type == Type::F16X2)
                   : of_half<Instruction, F16, false>(type == Type::F16X2);
    case Type::BF16:
    case Type::BF16X2:
      return of_half<Instruction, BF16, false>(type == Type::BF16X2);
    case Type::F32:
      return flush ? Instruction::template one<compare<flushed_f32, uint32_t>> : of_number<Instruction, float>();
    case Type::F64:
      return of_number<Instruction, double>();
    default:
      return bits_of(type) == 16   ? of_number<Instruction, uint16_t>()
             : bits_of(type) == 32 ? of_number<Instruction, uint32_t>()
                                   : of_number<Instruction, uint64_t>();
  }
}

// The comparison and the Boolean operator; false where c and .BoolOp are not together.
bool choose_comparison(const Chosen& chosen, Operation& operation, Slot c) {
  int comparison =
      chosen.one_of({"eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"}, -1);
  if (comparison < 0) comparison = LT + chosen.one_of({"lo", "ls", "hi", "hs"}, 0);
  operation.option[COMPARISON] = static_cast<uint8_t>(comparison);
  operation.option[BOOLEAN] = static_cast<uint8_t>(chosen.one_of({"and", "or", "xor"}, -1) + 1);
  return (operation.option[BOOLEAN] != NONE) == (c != NO_SLOT);
}

bool choose_setp(const Chosen& chosen, Operation& operation) {
  const Type type = chosen.type();
  operation.run = handler_for<Setp>(type, chosen.has("ftz"));
  return choose_comparison(chosen, operation, operation.slot[4]);
}
// For .f16 and .bf16 there is no q.
bool choose_setp_half(const Chosen& chosen, Operation& operation) {
  return operation.slot[1] == NO_SLOT && choose_setp(chosen, operation);
}

bool choose_set(const Chosen& chosen, Operation& operation) {
  const Type to = chosen.type(0), from = chosen.type(1);
  const bool pair = from == Type::F16X2 || from == Type::BF16X2;
  switch (to) {
    case Type::F32:
      operation.immediate = std::bit_cast<int32_t>(1.0f);
      break;
    case Type::F16:
    case Type::F16X2:
      operation.immediate = 0x3c00;
      break;
    case Type::BF16:
    case Type::BF16X2:
      operation.immediate = 0x3f80;
      break;
    case Type::U16:
    case Type::S16:
      if (from != Type::F16 && from != Type::BF16) return false;
      operation.immediate = 0xffff;
      break;
    case Type::U32:
    case Type::S32:
      operation.immediate = pair ? 0xffff : 0xffffffff;
      break;
    default:  // the types are the wrong way round
      return false;
  }
  operation.run = handler_for<Set>(from, chosen.has("ftz"));
  return choose_comparison(chosen, operation, operation.slot[3]);
}

// ---- selp, slct ----

template <class T>
void selp(Warp& warp, const Operation& operation, uint32_t lanes) {
  Cell<T>* const d = warp.lanes<Cell<T>>(operation.slot[0]);
  const Cell<T>* const a = warp.lanes<Cell<T>>(operation.slot[1]);
  const Cell<T>* const b = warp.lanes<Cell<T>>(operation.slot[2]);
  const uint32_t choice = warp.predicate(operation.slot[3]);
  each_alone(lanes, [&](int lane) {
    d[lane] = static_cast<T>(choice & LANE_BIT[static_cast<size_t>(lane)] ? a[lane] : b[lane]);
  });
}

bool choose_selp(const Chosen& chosen, Operation& operation) {
  const int bits = bits_of(chosen.type());
  operation.run = bits == 16 ? selp<uint16_t> : bits == 32 ? selp<uint32_t> : selp<uint64_t>;
  return true;
}

// NaN is not >= 0; of the flushed numbers, the negative subnormal ones are -0.
constexpr auto by_sign = [](auto a, auto b, auto c) { return c >= 0 ? a : b; };
constexpr auto by_flushed_sign = [](auto a, auto b, float c) { return c > -FLT_MIN ? a : b; };

template <auto F, class C, class... T>
bool choose_slct_of(int bits, Operation& operation, Types<T...>) {
  return ((bits == 8 * sizeof(T) && (operation.run = lanewise<F, T, T, T, C>)) || ...);
}

bool choose_slct(const Chosen& chosen, Operation& operation) {
  const int bits = bits_of(chosen.type(0));
  if (chosen.type(1) == Type::S32) return choose_slct_of<by_sign, int32_t>(bits, operation, Words());
  return chosen.has("ftz") ? choose_slct_of<by_flushed_sign, float>(bits, operation, Words())
                           : choose_slct_of<by_sign, float>(bits, operation, Words());
}

constexpr Form FORMS[] = {
    {"setp", "eq|ne and|or|xor? b16|b32|b64", "=p|p?, 0, 0, !p?", choose_setp},
    {"setp", "eq|ne|lt|le|gt|ge and|or|xor? s16|s32|s64", "=p|p?, 0, 0, !p?", choose_setp},
    {"setp", "eq|ne|lt|le|gt|ge|lo|ls|hi|hs and|or|xor? u16|u32|u64", "=p|p?, 0, 0, !p?", choose_setp},
    {"setp", "eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan and|or|xor? ftz? f32", "=p|p?, 0, 0, !p?", choose_setp},
    {"setp", "eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan and|or|xor? f64", "=p|p?, 0, 0, !p?", choose_setp},
    {"setp", "eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan and|or|xor? ftz? f16", "=p|p?, 0, 0, !p?",
     choose_setp_half},
    {"setp", "eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan and|or|xor? bf16", "=p|p?, 0, 0, !p?",
     choose_setp_half},
    {"setp", "eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan and|or|xor? ftz? f16x2", "=p|p?, 0, 0, !p?",
     choose_setp},
    {"setp", "eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan and|or|xor? bf16x2", "=p|p?, 0, 0, !p?", choose_setp},
    {"set", "eq|ne and|or|xor? u32|s32|f32|f16|bf16 b16|b32|b64", "=0, 1, 1, !p?", choose_set},
    {"set", "eq|ne|lt|le|gt|ge and|or|xor? u32|s32|f32|f16|bf16 s16|s32|s64", "=0, 1, 1, !p?", choose_set},
    {"set", "eq|ne|lt|le|gt|ge|lo|ls|hi|hs and|or|xor? u32|s32|f32|f16|bf16 u16|u32|u64", "=0, 1, 1, !p?", choose_set},
    {"set", "eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan and|or|xor? ftz? u32|s32|f32|f16 f32", "=0, 1, 1, !p?",
     choose_set},
    {"set", "eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan and|or|xor? bf16 f16|f32", "=0, 1, 1, !p?", choose_set},
    {"set", "eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan and|or|xor? u32|s32|f32|f16|bf16 f64", "=0, 1, 1, !p?",
     choose_set},
    {"set", "eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan and|or|xor? ftz? u16|s16|u32|s32|f16 f16",
     "=0, 1, 1, !p?", choose_set},
    {"set", "eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan and|or|xor? u16|s16|u32|s32|bf16 bf16", "=0, 1, 1, !p?",
     choose_set},
    {"set", "eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan and|or|xor? ftz? u32|s32|f16x2 f16x2", "=0, 1, 1, !p?",
     choose_set},
    {"set", "eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan and|or|xor? u32|s32|bf16x2 bf16x2", "=0, 1, 1, !p?",
     choose_set},
    {"selp", "b16|b32|b64|u16|u32|u64|s16|s32|s64|f32|f64", "=0, 0, 0, !p", choose_selp},
    {"slct", "b16|b32|b64|u16|u32|u64|s16|s32|s64|f32|f64 s32", "=0, 0, 0, 1", choose_slct},
    {"slct", "ftz? b16|b32|b64|u16|u32|u64|s16|s32|s64|f32|f64 f32", "=0, 0, 0, 1", choose_slct},
};

}  // namespace

Forms comparison_forms() { return FORMS; }

}  // namespace sparse24::ptx
