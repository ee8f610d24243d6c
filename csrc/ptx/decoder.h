// From the tree of a kernel and the device functions it calls to a Program. Three parts:
//   decode.cpp           functions, labels, calls; choosing a form for each instruction
//   decode_operands.cpp  operands to slots, with the hidden operations that widen, narrow and negate
//   decode_symbols.cpp   registers, variables and where they lie
#pragma once
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "csrc/ptx/isa.h"
#include "csrc/ptx/program.h"
#include "csrc/ptx/syntax.h"

namespace sparse24::ptx {

// A row's operands (see Form), parsed.
struct OperandRule {
  enum class Kind : uint8_t { VALUE, PREDICATE, VECTOR, ADDRESS, IMMEDIATE, MASK, LABEL, LABELS };
  Kind kind = Kind::VALUE;
  bool result = false;
  bool optional = false;
  bool negatable = false;       // !p
  bool pair_predicate = false;  // T|p?
  bool doubled = false;         // 0w
  int type_index = -1;          // of the instruction's types; -1: `type`
  Type type = Type::NONE;
};
const std::vector<OperandRule>& rules_of(const Form& form);

// What a name means.
struct Symbol {
  enum class Kind : uint8_t { REGISTER, VARIABLE };
  Kind kind = Kind::REGISTER;
  Type type = Type::NONE;
  Slot slot = NO_SLOT;  // of a register
  Space space = Space::GENERIC;
  uint64_t address = 0;          // of a variable: offset in its space
  int32_t module_variable = -1;  // of global and const variables: index in Module::variables
  uint64_t bytes = 0;
};

// A family name<count> of registers.
struct RegisterRange {
  Type type;
  uint32_t count;
};

struct Scope {
  std::unordered_map<std::string_view, Symbol> symbols;
  std::unordered_map<std::string_view, RegisterRange> ranges;
  uint32_t id = 0;           // counted within the function, in the order of the text
  uint32_t params_used = 0;  // Decoder::params_used_ when the scope began
};

// A function as its callers see it.
struct CallTarget {
  uint32_t entry = 0;
  std::vector<Symbol> results, parameters;
};

class Decoder {
 public:
  Decoder(const Module& module, const Function& kernel);
  std::unique_ptr<const Program> run();

 private:
  // ---- decode.cpp ----
  void collect(const Function& function, std::set<std::string_view>& on_path);
  void decode_function(const Function& function);
  void find_labels(const Function& function);
  void instruction(const Instruction& instruction);
  bool try_form(const Form& form, const Instruction& instruction);
  void call(const Instruction& instruction);
  void call_external(const Instruction& instruction, std::string_view name, const Operand* results,
                     const Operand* arguments);
  uint32_t label(std::string_view name, Place place) const;
  void branch(const Instruction& instruction, Operation& operation);
  void emit(const Operation& operation);
  void finish();
  [[noreturn]] void refuse(const Instruction& instruction) const;

  // ---- decode_operands.cpp ----
  // Appends the slots of one operand; false where the operand cannot be what the rule wants.
  bool operand(const OperandRule& rule, const Operand& operand, Type type, Operation& operation);
  Slot source(const Operand& operand, Type type);
  Slot result(const Operand& operand, Type type);
  Slot predicate_source(const Operand& operand);
  Slot predicate_result(const Operand& operand);
  bool address(const Operand& operand, Operation& operation);
  bool may_be_wider() const;
  Slot special(std::string_view name);  // NO_SLOT: not a special register
  Slot constant(uint64_t bits, bool wide, int32_t variable = -1);
  Slot predicate_constant(bool value);
  Slot new_slot(Type type);
  Operation hidden(Handler run, std::initializer_list<Slot> slots);
  uint64_t immediate(const Operand& operand, Type type) const;

  // ---- decode_symbols.cpp ----
  void declare(const Variable& variable);
  void declare_shared();
  void declare_parameters(const Function& function);
  const Symbol* lookup(std::string_view name);
  void add_symbol(const Variable& variable, const Symbol& symbol);
  void begin_frame(const Function& function);
  uint32_t frame_space(uint32_t& used, uint64_t bytes, uint32_t align);
  static uint64_t bytes_of(const Variable& variable);
  static uint32_t align_of(const Variable& variable);

  const Module& module_;
  const Function& kernel_;
  std::unique_ptr<Program> program_;
  std::unordered_map<std::string_view, const Function*> functions_;
  std::vector<const Function*> order_;  // callees first
  std::set<std::string_view> used_names_;
  std::unordered_map<std::string_view, CallTarget> targets_;
  std::unordered_map<std::string_view, uint32_t> opcodes_;
  std::map<std::tuple<uint64_t, bool, int32_t>, Slot> constants_;
  std::unordered_map<std::string_view, Slot> specials_;
  std::deque<std::string> opcode_names_;

  // of the function being decoded
  const Function* function_ = nullptr;
  std::vector<Scope> scopes_;
  uint32_t scope_count_ = 0;
  std::unordered_map<std::string_view, Symbol> shared_;
  std::map<std::pair<uint32_t, std::string_view>, uint32_t> labels_;  // scope and name to an index of label_at_
  std::map<std::pair<uint32_t, std::string_view>, const Targets*> target_lists_;
  std::vector<uint32_t> label_at_;  // the operation a label stands before
  struct Fixup {
    bool indexed;    // an entry of Program::targets; else the target of an operation
    uint32_t index;  // of either
    uint32_t label;
  };
  std::vector<Fixup> fixups_;
  uint32_t params_used_ = 0, local_used_ = 0;  // ends of the two parts of the function's frame

  // of the instruction being decoded
  const Instruction* instruction_ = nullptr;
  Origin origin_;
  Slot guard_ = NO_SLOT;
  bool guard_negated_ = false;
  std::vector<Operation> before_, after_;
  std::vector<Slot> slots_;  // of the operation under way
  int addresses_ = 0;
  bool in_pair_ = false;  // the operand is the first of a|p

  // slots are found by index until the program is whole: its vector of them grows
  std::unordered_map<Slot, uint32_t> slot_widths_;          // bytes
  std::vector<std::pair<uint32_t, uint32_t>> slot_ranges_;  // first and count, one an operation
};

// Lets registers that are never alive together share their slots: a file of thousands of virtual registers becomes one
// of a few hundred, which stays in the cache. `ranges`: first and number of each operation's slots in Program::slots;
// `widths`: bytes of each slot.
void compact_registers(Program& program, const std::vector<std::pair<uint32_t, uint32_t>>& ranges,
                       const std::unordered_map<Slot, uint32_t>& widths);

// ---- hidden operations: hidden.cpp ----
namespace hidden {
void narrow(Warp& warp, const Operation& operation, uint32_t lanes);        // 32 low bits of a 64-bit slot
void widen_signed(Warp& warp, const Operation& operation, uint32_t lanes);  // 32 bits to 64
void widen_unsigned(Warp& warp, const Operation& operation, uint32_t lanes);
// In a 32-bit slot: of the low `immediate` bits.
void extend_signed(Warp& warp, const Operation& operation, uint32_t lanes);
void extend_unsigned(Warp& warp, const Operation& operation, uint32_t lanes);
void negate(Warp& warp, const Operation& operation, uint32_t lanes);  // of a predicate
// `immediate` bytes of local memory, from offset[1] to offset[0]: an argument or a result of a call.
void copy_local(Warp& warp, const Operation& operation, uint32_t lanes);
void move(Warp& warp, const Operation& operation, uint32_t lanes);
void move_wide(Warp& warp, const Operation& operation, uint32_t lanes);
void clock(Warp& warp, const Operation& operation, uint32_t lanes);  // instructions executed by the block
void clock_wide(Warp& warp, const Operation& operation, uint32_t lanes);
}  // namespace hidden

}  // namespace sparse24::ptx
