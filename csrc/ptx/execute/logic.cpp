// Logic and shifts, and the permutation of bytes. Source: PTX ISA, "Logic and Shift Instructions", prmt.
#include <algorithm>

#include "csrc/ptx/execute/family.h"
#include "csrc/ptx/execute/lanes.h"

namespace sparse24::ptx {
namespace {

constexpr auto conjunction = []<class T>(T a, T b) { return a & b; };
constexpr auto disjunction = []<class T>(T a, T b) { return a | b; };
constexpr auto difference = []<class T>(T a, T b) { return a ^ b; };
constexpr auto complement = []<class T>(T a) { return ~a; };
constexpr auto logical_not = []<class T>(T a) { return a == 0; };

// The same of predicates, whose lanes are bits.
template <auto F>
void of_predicates(Warp& warp, const Operation& operation, uint32_t lanes) {
  write_predicate(warp, operation.slot[0], lanes,
                  F(warp.predicate(operation.slot[1]), warp.predicate(operation.slot[2])));
}

void not_predicate(Warp& warp, const Operation& operation, uint32_t lanes) {
  write_predicate(warp, operation.slot[0], lanes, ~warp.predicate(operation.slot[1]));
}

// Amounts above the width count as the width.
constexpr auto shift_left = []<class T>(T a, uint32_t amount) -> T {
  return amount < 8 * sizeof(T) ? static_cast<T>(static_cast<Cell<T>>(a) << amount) : T{0};
};
constexpr auto shift_right = []<class T>(T a, uint32_t amount) -> T {
  constexpr uint32_t most = 8 * sizeof(T) - 1;
  if (std::is_signed_v<T>) return static_cast<T>(a >> std::min(amount, most));
  return amount <= most ? static_cast<T>(a >> amount) : T{0};
};

template <auto F, class... T>
bool choose_shift(Type type, Operation& operation, Types<T...>) {
  return ((stands_for<T>(type) && (operation.run = lanewise<F, T, T, uint32_t>)) || ...);
}

template <auto F>
bool shift(const Chosen& chosen, Operation& operation) {
  return choose_shift<F>(chosen.type(), operation, Integers());
}

// {b, a} shifted: the upper word for the left, the lower for the right.
template <bool LEFT, bool WRAP>
constexpr auto funnel = [](uint32_t a, uint32_t b, uint32_t c) {
  const uint64_t both = (static_cast<uint64_t>(b) << 32) | a;
  const uint32_t amount = WRAP ? c & 31 : std::min(c, 32u);
  return static_cast<uint32_t>(LEFT ? (both << amount) >> 32 : both >> amount);
};

template <auto F, int N>
constexpr auto of_b32 = always<uniform<F, uint32_t, N>()>;

// ---- lop3 ----

enum Lop3Option { BOOLEAN };  // index of Operation::option
enum Boolean : uint8_t { NO_BOOLEAN, OR, AND };

// The table's bit 4 i + 2 j + k is the result for bits i, j, k of a, b, c: seven choices between two values.
void lop3(Warp& warp, const Operation& operation, uint32_t lanes) {
  const auto row = [&](int bit) { return (operation.immediate >> bit) & 1 ? ~0u : 0u; };
  const auto choice = [](uint32_t by, uint32_t one, uint32_t zero) { return zero ^ (by & (one ^ zero)); };
  const uint32_t *const a = warp.lanes<uint32_t>(operation.slot[2]), *const b = warp.lanes<uint32_t>(operation.slot[3]),
                        *const c = warp.lanes<uint32_t>(operation.slot[4]);
  uint32_t unused[LANES];
  uint32_t* const d = operation.slot[0] == NO_SLOT ? unused : warp.lanes<uint32_t>(operation.slot[0]);
  const uint32_t row0 = row(0), row1 = row(1), row2 = row(2), row3 = row(3), row4 = row(4), row5 = row(5),
                 row6 = row(6), row7 = row(7);
  each_alone(lanes, [&](int lane) {
    const uint32_t x = a[lane], y = b[lane], z = c[lane];
    d[lane] = choice(x, choice(y, choice(z, row7, row6), choice(z, row5, row4)),
                     choice(y, choice(z, row3, row2), choice(z, row1, row0)));
  });
  if (operation.option[BOOLEAN] == NO_BOOLEAN) return;
  const uint32_t truth = lanes_where(lanes, [&](int lane) { return d[lane] != 0; });
  const uint32_t q = warp.predicate(operation.slot[6]);
  write_predicate(warp, operation.slot[1], lanes, operation.option[BOOLEAN] == OR ? truth | q : truth & q);
}

bool choose_lop3(const Chosen& chosen, Operation& operation) {
  operation.option[BOOLEAN] = static_cast<uint8_t>(chosen.one_of({"or", "and"}, -1) + 1);
  // With .BoolOp there is a predicate and d may be `_`; without, it is the other way round.
  const bool has_d = operation.slot[0] != NO_SLOT, has_p = operation.slot[1] != NO_SLOT;
  if (operation.option[BOOLEAN] != NO_BOOLEAN ? !has_p : has_p || !has_d) return false;
  if (operation.immediate < 0 || operation.immediate > 255) return false;
  operation.run = lop3;
  return true;
}

// ---- prmt ----

uint32_t byte_of(uint64_t bytes, uint32_t index) { return static_cast<uint32_t>(bytes >> (8 * index)) & 0xff; }

constexpr auto permute = [](uint32_t a, uint32_t b, uint32_t selectors) {
  const uint64_t bytes = (static_cast<uint64_t>(b) << 32) | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t selector = selectors >> (4 * i), byte = byte_of(bytes, selector & 7);
    const uint32_t sign = byte & 0x80 ? 0xffu : 0u;
    d |= (selector & 8 ? sign : byte) << (8 * i);
  }
  return d;
};

// As a rule all lanes have the same selectors, and then each byte is one shift of one of the words.
void permute_lanes(Warp& warp, const Operation& operation, uint32_t lanes) {
  const uint32_t *const a = warp.lanes<uint32_t>(operation.slot[1]), *const b = warp.lanes<uint32_t>(operation.slot[2]),
                        *const c = warp.lanes<uint32_t>(operation.slot[3]);
  const uint32_t selectors = c[__builtin_ctz(lanes)];
  if (lanes_where(lanes, [&](int lane) { return c[lane] == selectors; }) != lanes) {
    return lanewise<permute, uint32_t, uint32_t, uint32_t, uint32_t>(warp, operation, lanes);
  }
  const uint32_t* word[4];
  uint32_t shift[4], sign[4];
  for (int i = 0; i < 4; ++i) {
    const uint32_t selector = selectors >> (4 * i);
    word[i] = selector & 4 ? b : a;
    shift[i] = 8 * (selector & 3);
    sign[i] = selector & 8 ? 0xff : 0;
  }
  uint32_t* const d = warp.lanes<uint32_t>(operation.slot[0]);
  each_alone(lanes, [&](int lane) {
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
      const uint32_t byte = (word[i][lane] >> shift[i]) & 0xff;
      result |= ((byte & ~sign[i]) | (-(byte >> 7) & sign[i])) << (8 * i);
    }
    d[lane] = result;
  });
}

// The modes with a name choose by two bits of c; rows are their selectors as those of the nameless mode.
struct PermuteMode {
  std::string_view name;
  uint32_t selectors[4];
};
constexpr PermuteMode PERMUTE_MODES[] = {
    {"f4e", {0x3210, 0x4321, 0x5432, 0x6543}}, {"b4e", {0x5670, 0x6701, 0x7012, 0x0123}},
    {"rc8", {0x0000, 0x1111, 0x2222, 0x3333}}, {"ecl", {0x3210, 0x3211, 0x3222, 0x3333}},
    {"ecr", {0x0000, 0x1110, 0x2210, 0x3210}}, {"rc16", {0x1010, 0x3232, 0x1010, 0x3232}},
};

template <int MODE>
constexpr auto permute_by_mode =
    [](uint32_t a, uint32_t b, uint32_t c) { return permute(a, b, PERMUTE_MODES[MODE].selectors[c & 3]); };

template <int... MODE>
bool choose_mode(const Chosen& chosen, Operation& operation, std::integer_sequence<int, MODE...>) {
  return ((chosen.has(PERMUTE_MODES[MODE].name) && (operation.run = uniform<permute_by_mode<MODE>, uint32_t, 3>())) ||
          ...);
}

bool choose_permute(const Chosen& chosen, Operation& operation) {
  return choose_mode(chosen, operation, std::make_integer_sequence<int, std::size(PERMUTE_MODES)>());
}

constexpr Form LOGIC[] = {
    {"and", "b16|b32|b64", "=0, 0, 0", by_width<conjunction, 2>},
    {"and", "pred", "=p, !p, !p", always<of_predicates<conjunction>>},
    {"or", "b16|b32|b64", "=0, 0, 0", by_width<disjunction, 2>},
    {"or", "pred", "=p, !p, !p", always<of_predicates<disjunction>>},
    {"xor", "b16|b32|b64", "=0, 0, 0", by_width<difference, 2>},
    {"xor", "pred", "=p, !p, !p", always<of_predicates<difference>>},
    {"not", "b16|b32|b64", "=0, 0", by_width<complement, 1>},
    {"not", "pred", "=p, !p", always<not_predicate>},
    {"cnot", "b16|b32|b64", "=0, 0", by_width<logical_not, 1>},
    {"lop3", "b32", "=b32|p?, b32, b32, b32, i", choose_lop3},
    {"lop3", "or|and b32", "=b32|p?, b32, b32, b32, i, !p", choose_lop3},
    {"shl", "b16|b32|b64", "=0, 0, u32", shift<shift_left>},
    {"shr", "b16|b32|b64|u16|u32|u64|s16|s32|s64", "=0, 0, u32", shift<shift_right>},
    {"shf", "l clamp b32", "=b32, b32, b32, u32", of_b32<funnel<true, false>, 3>},
    {"shf", "l wrap b32", "=b32, b32, b32, u32", of_b32<funnel<true, true>, 3>},
    {"shf", "r clamp b32", "=b32, b32, b32, u32", of_b32<funnel<false, false>, 3>},
    {"shf", "r wrap b32", "=b32, b32, b32, u32", of_b32<funnel<false, true>, 3>},
    {"prmt", "b32", "=b32, b32, b32, b32", always<permute_lanes>},
    {"prmt", "b32 f4e|b4e|rc8|ecl|ecr|rc16", "=b32, b32, b32, b32", choose_permute},
};

}  // namespace

Forms logic_forms() {
  static const std::vector<Form> forms = join({LOGIC, bit_forms()});
  return forms;
}

}  // namespace sparse24::ptx
