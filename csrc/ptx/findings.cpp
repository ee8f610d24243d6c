// Names of the findings, and which check each belongs to.
#include "csrc/ptx/findings.h"

namespace sparse24::ptx {
namespace {

struct Row {
  Kind kind;
  const char* name;
  uint32_t check;
};

constexpr uint32_t bit(Check check) { return static_cast<uint32_t>(check); }

constexpr std::array<Row, KINDS> ROWS = {{
    {Kind::OUT_OF_BOUNDS, "out_of_bounds", bit(Check::MEMORY)},
    {Kind::MISALIGNED, "misaligned", bit(Check::MEMORY)},
    {Kind::FREED, "freed", bit(Check::MEMORY)},
    {Kind::READ_ONLY, "read_only", bit(Check::MEMORY)},
    {Kind::UNINITIALIZED, "uninitialized", bit(Check::INIT)},
    {Kind::RACE_SHARED, "race_shared", bit(Check::RACE)},
    {Kind::RACE_WARP, "race_warp", bit(Check::RACE)},
    {Kind::RACE_GLOBAL, "race_global", bit(Check::RACE)},
    {Kind::DIVERGENT_BARRIER, "divergent_barrier", bit(Check::SYNC)},
    {Kind::DIVERGENT_INSTRUCTION, "divergent_instruction", bit(Check::SYNC)},
    {Kind::WRONG_MASK, "wrong_mask", bit(Check::SYNC)},
    {Kind::EXITED_LANE, "exited_lane", bit(Check::SYNC)},
    {Kind::ASYNC_IN_FLIGHT, "async_in_flight", bit(Check::ASYNC)},
    {Kind::BAD_SELECTOR, "bad_selector", bit(Check::TENSOR)},
    {Kind::BAD_METADATA, "bad_metadata", bit(Check::TENSOR)},
    {Kind::DEADLOCK, "deadlock", 0},
    {Kind::BUDGET, "budget", 0},
    {Kind::TRAP, "trap", 0},
    {Kind::ILLEGAL, "illegal", 0},
}};

constexpr bool rows_are_in_order() {
  for (size_t i = 0; i < ROWS.size(); ++i) {
    if (static_cast<size_t>(ROWS[i].kind) != i) return false;
  }
  return true;
}
static_assert(rows_are_in_order());

}  // namespace

const char* name_of(Kind kind) { return ROWS[static_cast<size_t>(kind)].name; }
uint32_t check_of(Kind kind) { return ROWS[static_cast<size_t>(kind)].check; }

}  // namespace sparse24::ptx
