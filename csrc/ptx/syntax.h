// PTX text as a tree, and the parser that makes it. Nothing here knows what an opcode does.
//
// The tree's names are views of the text, which the Module keeps. Source: PTX ISA, "Syntax", "Directives".
#pragma once
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "csrc/ptx/types.h"

namespace sparse24::ptx {

struct Place {
  uint32_t line = 0, column = 0;  // both from 1, in the PTX text; columns in bytes
};

// What is wrong with a PTX text. what() reads "line 12, column 5: expected ';' after operand; got 'foo'".
class SyntaxError : public std::runtime_error {
 public:
  SyntaxError(Place place, const std::string& message);
  Place place;
};

// Where in the kernel's own source an instruction comes from, by the last .loc before it.
struct SourceLine {
  uint32_t file = 0;  // of Module::files; 0: no .loc yet
  uint32_t line = 0;
};

struct Operand {
  enum class Kind : uint8_t {
    NAME,     // register, special register (its ".x" included), variable, label, function: `name`, plus `offset`
    INTEGER,  // `bits`, two's complement of 64 bits; constant expressions come folded
    REAL,     // `bits`: those of an f32 where `real_bits` is 32 (0f...), of an f64 where it is 64 (0d..., 1.5)
    VECTOR,   // {a, b, ...}: `parts`
    ADDRESS,  // [name + offset] or [integer]: `name` is empty for the latter. [a, {x, y}] has more `parts`
    PAIR,     // p|q: two `parts`
    LIST,     // (a, b): `parts`; the arguments and results of call
    SINK,     // _
  };
  Kind kind = Kind::SINK;
  bool negated = false;  // !p
  uint8_t real_bits = 0;
  Place place;
  std::string_view name;
  uint64_t bits = 0;
  int64_t offset = 0;
  std::vector<Operand> parts;
};

struct Instruction {
  Place place;
  SourceLine source;
  std::string_view predicate;  // @p or @!p; empty without one
  bool predicate_negated = false;
  std::string_view opcode;                  // up to its first dot
  std::vector<std::string_view> modifiers;  // without their dots, in the order of the text: "global", "L2::128B"
  std::vector<Operand> operands;
  std::string_view text;  // the whole instruction, from opcode to before ';', for messages
};

// One word of an initialiser: an integer, a real, or the address of a variable. Words that none names are zero.
struct Initializer {
  uint64_t index = 0;  // which scalar of the variable: elements of vectors count one by one
  uint64_t bits = 0;
  uint8_t real_bits = 0;    // 0: integer
  std::string_view symbol;  // not empty: the address of this variable plus `bits`
  bool generic = false;     // generic(symbol)
  uint8_t mask_byte = 0;    // 0xFF00(symbol): which byte of the address, plus 1; 0: all of it
};

struct Variable {
  Place place;
  Space space = Space::REGISTER;
  Type type = Type::NONE;
  std::string_view name;
  uint32_t vector = 1;    // .v2, .v4
  uint32_t count = 0;     // name<count>: registers name0 to name(count-1)
  uint64_t elements = 1;  // product of the array's extents; 0 for []: an extern array, or one sized by its initialiser
  uint32_t align = 0;     // bytes; 0: that of the type
  bool is_extern = false;
  std::vector<Initializer> initializer;
  bool pointer = false;  // a kernel parameter marked .ptr
  Space pointer_space = Space::GENERIC;
  uint32_t pointer_align = 0;  // bytes; 0: not said
};

struct Label {
  Place place;
  std::string_view name;
};
// .branchtargets and .calltargets: `name: .branchtargets L0, L1;`
struct Targets {
  Place place;
  std::string_view name;
  std::vector<std::string_view> labels;
};
struct ScopeBegin {};
struct ScopeEnd {};
using Statement = std::variant<Instruction, Label, Variable, Targets, ScopeBegin, ScopeEnd>;

struct Function {
  Place place;
  std::string_view name;
  bool is_entry = false;
  bool is_extern = false;  // or a forward declaration: without body
  std::vector<Variable> results, parameters;
  uint32_t max_threads[3] = {0, 0, 0};       // .maxntid; zeros: not said
  uint32_t required_threads[3] = {0, 0, 0};  // .reqntid
  uint32_t max_registers = 0;                // .maxnreg
  uint32_t min_blocks = 0;                   // .minnctapersm
  std::vector<Statement> body;
};

struct Module {
  std::string text;
  int version_major = 0, version_minor = 0;
  std::string_view target;  // "sm_80"
  int address_bits = 64;
  std::vector<Variable> variables;  // of module scope: global, const, shared
  std::vector<Function> functions;
  std::vector<std::string> files;  // by the number of .file; files[0] is empty
};

// Throws SyntaxError. The tree owns a copy of `text`. What it does not read: the contents of .section, .pragma and
// .attribute. 32-bit addresses are an error.
std::unique_ptr<const Module> parse(std::string_view text);

}  // namespace sparse24::ptx
