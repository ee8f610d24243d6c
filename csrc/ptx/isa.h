// The instruction set as data: every form that the machine runs. docs/emulator.md's table is printed from it.
//
// A form is one row: an opcode, the modifiers it takes, its operands, and a function that chooses the handler. Each
// family of instructions (execute/*.cpp) keeps its rows beside its handlers.
#pragma once
#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "csrc/ptx/program.h"
#include "csrc/ptx/syntax.h"

namespace sparse24::ptx {

// The modifiers that an instruction has, as its form understood them.
class Chosen {
 public:
  explicit Chosen(std::vector<std::string_view> modifiers) : modifiers_(std::move(modifiers)) {}
  bool has(std::string_view modifier) const;
  // The index in `names` of the one that is there, or `otherwise`.
  int one_of(std::initializer_list<std::string_view> names, int otherwise) const;
  // The n-th modifier that is a type; NONE where there are fewer.
  Type type(int n = 0) const;
  // The number at the end of the first modifier that is `prefix` and a number: number("x") of ldmatrix's "x4" is 4.
  int number(std::string_view prefix, int otherwise) const;
  // Which of the modifiers, in the order of the text, is `modifier`; -1 where none is. The first of two.
  int place_of(std::string_view modifier) const {
    for (size_t i = 0; i < modifiers_.size(); ++i) {
      if (modifiers_[i] == modifier) return static_cast<int>(i);
    }
    return -1;
  }
  // The whole modifier that starts with `prefix`, or "".
  std::string_view starting(std::string_view prefix) const;

 private:
  std::vector<std::string_view> modifiers_;
};

// One row of the table.
//
// modifiers: groups separated by spaces, each of alternatives separated by '|', optional if it ends in '?':
//   "rn|rz|rm|rp? ftz? sat? f32". An instruction's modifiers go, left to right, each to the first group still free that
//   has it: so their order is free where it cannot matter, and two groups of types fill in order.
//   '*' at the end of an alternative stands for any rest: "L2::*".
//
// operands: items separated by ", "; '=' marks a result. An item is
//   0 1 2 3  of the type of that group of types: 0 is the first type modifier, 1 the second ...
//   0w       of twice its width (mul.wide)
//   b32, u64, ...  of that type
//   p        predicate; !p one that may be negated; p|p? as in setp p|q
//   *T       a vector {a, b, ...} or a single register of T: "*0", "*b32"
//   [a]      an address
//   i        an integer immediate; it goes to Operation::immediate
//   m        a member mask (u32): it also becomes Operation::mask, with Presence::MASK
//   label, labels  of a branch
//   ? at the end: may be left out (its slot is then NO_SLOT). Sinks `_` give NO_SLOT as well.
// A result `T|p?` is a pair whose predicate may be left out: two slots (shfl, lop3, match.all).
struct Form {
  std::string_view opcode, modifiers, operands;
  // Sets operation.run, and whatever else of the operation depends on the modifiers (flow, presence, option). The
  // operands are already there (slot, count, wide, immediate, space). Returns false where this combination does not
  // exist or is not supported.
  bool (*choose)(const Chosen& chosen, Operation& operation);
};

using Forms = std::span<const Form>;

// The families, each at the end of its file in execute/.
Forms integer_forms();  // add sub mul mad ... of integers, dp4a, bfind, sad, ...
Forms logic_forms();    // and or xor not shl shr shf lop3 bfe bfi prmt popc clz brev ...
Forms move_forms();     // mov selp setp set slct cvta isspacep ... (mov's vectors included), nop-like hints
Forms float_forms();    // f32, f64: arithmetic, approximations
Forms half_forms();     // f16, bf16 and their pairs
Forms convert_forms();  // cvt
Forms memory_forms();   // ld st atom red cp.async ldmatrix stmatrix fences prefetch ...
Forms warp_forms();     // shfl vote match redux activemask elect, bar, barrier
Forms control_forms();  // bra brx ret exit trap
Forms tensor_forms();   // mma, mma.sp

// All of them; for one opcode, in order of preference.
const std::vector<const Form*>& all_forms();
const std::vector<const Form*>& forms_of(std::string_view opcode);

// Whether `modifiers` fit `form`; if not, `misfit` is the first that has no place.
bool fits(const Form& form, std::span<const std::string_view> modifiers, std::string_view* misfit);

// docs/emulator.md's table of supported instructions, in markdown.
std::string supported_instructions();

}  // namespace sparse24::ptx
