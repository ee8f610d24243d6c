// Functions, labels and calls; the choice of a form for each instruction.
#include <algorithm>
#include <optional>

#include "csrc/ptx/decoder.h"
#include "csrc/ptx/lexer.h"

namespace sparse24::ptx {
namespace {

// The state space that an instruction names first.
Space space_of(const Instruction& instruction) {
  for (std::string_view modifier : instruction.modifiers) {
    const std::string_view name = modifier.substr(0, modifier.find("::"));
    for (const Space space : {Space::GLOBAL, Space::SHARED, Space::LOCAL, Space::PARAM, Space::CONST}) {
      if (name == name_of(space)) return space;
    }
  }
  return Space::GENERIC;
}

std::string full_name(const Instruction& instruction) {
  std::string name(instruction.opcode);
  for (std::string_view modifier : instruction.modifiers) name += '.' + std::string(modifier);
  return name;
}

// What an instruction does with undefined values.
Use use_of(const Instruction& instruction, const Operation& operation) {
  const std::string_view opcode = instruction.opcode;
  if (opcode == "ld" || opcode == "ldu" || opcode == "ldmatrix") return Use::LOAD;
  if (opcode == "st") return Use::STORE;
  if (opcode == "mma") {
    const bool tall = std::ranges::any_of(instruction.modifiers, [](auto one) { return one.starts_with("m16n8"); });
    return tall ? Use::TENSOR : Use::TENSOR_WHOLE;
  }
  const bool touches_memory = opcode == "atom" || opcode == "red" || opcode == "cp" || opcode == "stmatrix";
  return touches_memory || operation.flow != Flow::NEXT ? Use::REPORT : Use::PROPAGATE;
}

constexpr size_t MAX_SLOTS = 255;  // what Operation::slots and count can say

}  // namespace

Decoder::Decoder(const Module& module, const Function& kernel)
    : module_(module), kernel_(kernel), program_(std::make_unique<Program>()) {
  for (const Function& function : module.functions) {
    const Function*& known = functions_[function.name];
    if (!known || !function.is_extern) known = &function;  // a definition before its declarations
  }
}

std::unique_ptr<const Program> Decoder::run() {
  program_->kernel = kernel_.name;
  std::copy_n(kernel_.max_threads, 3, program_->max_threads);
  std::copy_n(kernel_.required_threads, 3, program_->required_threads);
  std::set<std::string_view> on_path;
  collect(kernel_, on_path);
  declare_shared();
  for (const Function* function : order_) decode_function(*function);
  finish();
  return std::move(program_);
}

// The functions that `function` calls, then itself, in the order in which they are laid out: a warp runs the lanes with
// the lowest program counter first, so that callers wait for callees.
void Decoder::collect(const Function& function, std::set<std::string_view>& on_path) {
  if (std::ranges::find(order_, &function) != order_.end()) return;
  on_path.insert(function.name);
  for (const Statement& statement : function.body) {
    const auto* instruction = std::get_if<Instruction>(&statement);
    if (!instruction) continue;
    const auto visit = [&](const auto& self, const Operand& operand) -> void {
      if (!operand.name.empty()) used_names_.insert(operand.name);
      for (const Operand& part : operand.parts) self(self, part);
    };
    for (const Operand& operand : instruction->operands) {
      visit(visit, operand);
      if (instruction->opcode != "call" || operand.kind != Operand::Kind::NAME) continue;
      const auto callee = functions_.find(operand.name);
      if (callee == functions_.end() || callee->second->is_extern || callee->second->is_entry) continue;
      if (on_path.contains(operand.name)) {
        throw Unsupported(instruction->place, "recursion through " + quote(operand.name) + " is not supported");
      }
      if (on_path.size() > 200) throw Unsupported(instruction->place, "calls nest deeper than 200");
      collect(*callee->second, on_path);
    }
  }
  on_path.erase(function.name);
  order_.push_back(&function);
}

void Decoder::find_labels(const Function& function) {
  labels_.clear();
  target_lists_.clear();
  label_at_.clear();
  std::vector<uint32_t> open{0};
  uint32_t scopes = 0;
  for (const Statement& statement : function.body) {
    if (std::holds_alternative<ScopeBegin>(statement)) {
      open.push_back(++scopes);
    } else if (std::holds_alternative<ScopeEnd>(statement)) {
      open.pop_back();
    } else if (const auto* label = std::get_if<Label>(&statement)) {
      labels_[{open.back(), label->name}] = static_cast<uint32_t>(label_at_.size());
      label_at_.push_back(0);
    } else if (const auto* targets = std::get_if<Targets>(&statement)) {
      target_lists_[{open.back(), targets->name}] = targets;
    }
  }
}

void Decoder::decode_function(const Function& function) {
  function_ = &function;
  scopes_.assign(1, Scope{});
  scope_count_ = 0;
  fixups_.clear();
  begin_frame(function);
  const uint32_t entry = static_cast<uint32_t>(program_->operations.size());
  if (function.is_entry) program_->entry = entry;
  declare_parameters(function);
  if (!function.is_entry) targets_[function.name].entry = entry;
  find_labels(function);

  uint32_t next_label = 0;
  for (const Statement& statement : function.body) {
    if (std::holds_alternative<ScopeBegin>(statement)) {
      scopes_.emplace_back();
      scopes_.back().id = ++scope_count_;
      scopes_.back().params_used = params_used_;
    } else if (std::holds_alternative<ScopeEnd>(statement)) {
      params_used_ = scopes_.back().params_used;
      scopes_.pop_back();
    } else if (std::holds_alternative<Label>(statement)) {
      label_at_[next_label++] = static_cast<uint32_t>(program_->operations.size());
    } else if (const auto* variable = std::get_if<Variable>(&statement)) {
      declare(*variable);
    } else if (const auto* one = std::get_if<Instruction>(&statement)) {
      instruction(*one);
    }
  }
  // A function may end without ret, or with a label after its last instruction.
  Operation end;
  end.flow = function.is_entry ? Flow::EXIT : Flow::RETURN;
  end.hidden = true;
  guard_ = NO_SLOT;
  slots_.clear();
  emit(end);
  for (const Fixup& fixup : fixups_) {
    (fixup.indexed ? program_->targets[fixup.index] : program_->operations[fixup.index].target) =
        label_at_[fixup.label];
  }
}

// Operations are emitted with their slots in `slots_`; finish() makes pointers of them.
void Decoder::emit(const Operation& operation) {
  slot_ranges_.emplace_back(static_cast<uint32_t>(program_->slots.size()), static_cast<uint32_t>(slots_.size()));
  program_->slots.insert(program_->slots.end(), slots_.begin(), slots_.end());
  program_->operations.push_back(operation);
  program_->operations.back().guard = guard_;
  program_->operations.back().guard_negated = guard_negated_;
  program_->origins.push_back(origin_);
}

void Decoder::finish() {
  for (size_t i = 0; i < program_->operations.size(); ++i) {
    program_->operations[i].slot = program_->slots.data() + slot_ranges_[i].first;
    program_->operations[i].slots = static_cast<uint8_t>(slot_ranges_[i].second);
  }
  compact_registers(*program_, slot_ranges_, slot_widths_);
}

// An operation of decode.cpp's own. Its slots are put in `slots` for the moment: emit() is yet to come.
Operation Decoder::hidden(Handler run, std::initializer_list<Slot> slots) {
  Operation operation;
  operation.run = run;
  operation.hidden = true;
  // Until emit(), the operands' slots travel in the two offsets, which these operations do not use.
  int i = 0;
  for (const Slot slot : slots) operation.offset[i++] = slot;
  operation.count[0] = static_cast<uint8_t>(slots.size());
  operation.results = 1;
  return operation;
}

void Decoder::instruction(const Instruction& instruction) {
  instruction_ = &instruction;
  const std::string name = full_name(instruction);
  auto opcode = opcodes_.find(name);
  if (opcode == opcodes_.end()) {
    opcode_names_.push_back(name);
    opcode = opcodes_.emplace(opcode_names_.back(), static_cast<uint32_t>(program_->opcodes.size())).first;
    program_->opcodes.push_back(name);
  }
  origin_ = {instruction.place.line, instruction.place.column, instruction.source, opcode->second};
  guard_ = NO_SLOT;
  guard_negated_ = false;
  if (!instruction.predicate.empty()) {
    Operand predicate;
    predicate.kind = Operand::Kind::NAME;
    predicate.name = instruction.predicate;
    predicate.place = instruction.place;
    guard_ = predicate_source(predicate);
    guard_negated_ = instruction.predicate_negated;
  }
  if (instruction.opcode == "call") {
    call(instruction);
    return;
  }
  std::optional<SyntaxError> error;  // of the last form whose modifiers fit but whose operands did not
  for (const Form* form : forms_of(instruction.opcode)) {
    try {
      if (try_form(*form, instruction)) return;
    } catch (const Unsupported&) {
      throw;
    } catch (const SyntaxError& wrong) {
      error = wrong;
    }
  }
  if (error) throw *error;
  refuse(instruction);
}

bool Decoder::try_form(const Form& form, const Instruction& instruction) {
  std::string_view misfit;
  if (!fits(form, instruction.modifiers, &misfit)) return false;
  const std::vector<OperandRule>& rules = rules_of(form);
  const size_t required =
      static_cast<size_t>(std::ranges::count_if(rules, [](const auto& rule) { return !rule.optional; }));
  if (instruction.operands.size() < required || instruction.operands.size() > rules.size()) return false;

  before_.clear();
  after_.clear();
  slots_.clear();
  addresses_ = 0;
  in_pair_ = false;
  Operation operation;
  operation.space = space_of(instruction);
  const Chosen chosen(instruction.modifiers);
  size_t given = 0, spare = instruction.operands.size() - required;
  for (size_t i = 0; i < rules.size(); ++i) {
    const OperandRule& rule = rules[i];
    const size_t first = slots_.size();
    if (rule.optional && spare == 0) {
      slots_.push_back(NO_SLOT);
      if (i < MAX_OPERANDS) operation.count[i] = 0;
      continue;
    }
    spare -= rule.optional;
    const Type type = rule.type_index >= 0 ? chosen.type(rule.type_index) : rule.type;
    if (!operand(rule, instruction.operands[given++], type, operation)) return false;
    if (rule.result) operation.results = static_cast<uint8_t>(slots_.size());
    if (i >= MAX_OPERANDS) continue;
    operation.count[i] = static_cast<uint8_t>(slots_.size() - first);
    if (rule.kind == OperandRule::Kind::VALUE || rule.kind == OperandRule::Kind::VECTOR) {
      operation.wide |= static_cast<uint8_t>((bits_of(type) == 64) << i);
    }
  }
  if (slots_.size() > MAX_SLOTS) return false;
  operation.slot = slots_.data();  // for choose(); finish() sets it for good
  if (!form.choose(chosen, operation)) return false;
  operation.use = use_of(instruction, operation);

  const auto emit_hidden = [&](const Operation& one) {
    Operation plain = one;
    std::vector<Slot> own;
    for (int i = 0; i < one.count[0]; ++i) own.push_back(static_cast<Slot>(one.offset[i]));
    plain.offset[0] = plain.offset[1] = 0;
    std::swap(slots_, own);
    emit(plain);
    std::swap(slots_, own);
  };
  for (const Operation& one : before_) emit_hidden(one);
  if (operation.flow == Flow::BRANCH || operation.flow == Flow::BRANCH_INDEXED) branch(instruction, operation);
  emit(operation);
  for (const Operation& one : after_) emit_hidden(one);
  return true;
}

uint32_t Decoder::label(std::string_view name, Place place) const {
  for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
    if (const auto it = labels_.find({scope->id, name}); it != labels_.end()) return it->second;
  }
  throw SyntaxError(place, "there is no label " + quote(name));
}

void Decoder::branch(const Instruction& instruction, Operation& operation) {
  if (operation.flow == Flow::BRANCH) {
    const Operand& target = instruction.operands.at(0);
    fixups_.push_back({false, static_cast<uint32_t>(program_->operations.size()), label(target.name, target.place)});
    return;
  }
  const Operand& list = instruction.operands.at(1);
  for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
    const auto it = target_lists_.find({scope->id, list.name});
    if (it == target_lists_.end()) continue;
    operation.target = static_cast<uint32_t>(program_->targets.size());
    operation.immediate = static_cast<int64_t>(it->second->labels.size());
    for (std::string_view name : it->second->labels) {
      fixups_.push_back({true, static_cast<uint32_t>(program_->targets.size()), label(name, it->second->place)});
      program_->targets.push_back(0);
    }
    return;
  }
  throw SyntaxError(list.place, "there is no .branchtargets " + quote(list.name));
}

// call (results), function, (arguments): copies the arguments into the callee's frame, calls, copies the results back.
void Decoder::call(const Instruction& instruction) {
  const Operand *results = nullptr, *callee = nullptr, *arguments = nullptr;
  for (const Operand& operand : instruction.operands) {
    if (operand.kind == Operand::Kind::LIST) {
      (callee ? arguments : results) = &operand;
    } else if (!callee) {
      callee = &operand;
    }
  }
  if (!callee || callee->kind != Operand::Kind::NAME) throw SyntaxError(instruction.place, "call needs a function");
  const auto known = functions_.find(callee->name);
  if (known == functions_.end()) {
    if (lookup(callee->name)) throw Unsupported(instruction.place, "indirect calls are not supported");
    throw SyntaxError(callee->place, "there is no function " + quote(callee->name));
  }
  if (known->second->is_extern) {
    call_external(instruction, callee->name, results, arguments);
    return;
  }
  if (known->second->is_entry) {
    throw Unsupported(instruction.place, "a call of kernel " + quote(callee->name) + " is not supported");
  }
  const CallTarget& target = targets_.at(callee->name);
  static const std::vector<Operand> none;
  const std::vector<Operand>& given = arguments ? arguments->parts : none;
  const std::vector<Operand>& wanted = results ? results->parts : none;
  if (given.size() != target.parameters.size() || wanted.size() != target.results.size()) {
    throw SyntaxError(instruction.place, quote(callee->name) + " takes " + std::to_string(target.parameters.size()) +
                                             " arguments and gives " + std::to_string(target.results.size()) +
                                             " results; the call has " + std::to_string(given.size()) + " and " +
                                             std::to_string(wanted.size()));
  }
  const auto flush = [&](std::vector<Operation>& operations) {
    for (const Operation& one : operations) {
      Operation plain = one;
      slots_.clear();
      for (int i = 0; i < one.count[0]; ++i) slots_.push_back(static_cast<Slot>(one.offset[i]));
      plain.offset[0] = plain.offset[1] = 0;
      emit(plain);
    }
    operations.clear();
  };
  // Between an operand of the call and the callee's own place for it, in either direction.
  const auto pass = [&](const Operand& operand, const Symbol& formal, bool is_result) {
    before_.clear();
    after_.clear();
    const Symbol* actual = operand.kind == Operand::Kind::NAME ? lookup(operand.name) : nullptr;
    if (formal.kind == Symbol::Kind::VARIABLE) {
      if (!actual || actual->kind != Symbol::Kind::VARIABLE || actual->space != Space::LOCAL) {
        throw SyntaxError(operand.place, "expected a .param variable");
      }
      if (actual->bytes != formal.bytes) {
        throw SyntaxError(operand.place, quote(operand.name) + " has " + std::to_string(actual->bytes) +
                                             " bytes; the function's has " + std::to_string(formal.bytes));
      }
      Operation copy;
      copy.run = hidden::copy_local;
      copy.hidden = true;
      copy.offset[0] = static_cast<int64_t>(is_result ? actual->address : formal.address);
      copy.offset[1] = static_cast<int64_t>(is_result ? formal.address : actual->address);
      copy.immediate = static_cast<int64_t>(formal.bytes);
      slots_.clear();
      emit(copy);
      return;
    }
    if (formal.type == Type::PRED) throw Unsupported(operand.place, "predicates as arguments are not supported");
    const bool wide = bits_of(formal.type) == 64;
    const Slot to = is_result ? result(operand, formal.type) : formal.slot;
    const Slot from = is_result ? formal.slot : source(operand, formal.type);
    flush(before_);
    slots_ = {to, from};
    Operation copy;
    copy.run = wide ? hidden::move_wide : hidden::move;
    copy.hidden = true;
    copy.results = 1;
    if (to != NO_SLOT) emit(copy);
    flush(after_);
  };
  for (size_t i = 0; i < given.size(); ++i) pass(given[i], target.parameters[i], false);
  Operation jump;
  jump.flow = Flow::CALL;
  jump.target = target.entry;
  slots_.clear();
  emit(jump);
  for (size_t i = 0; i < wanted.size(); ++i) pass(wanted[i], target.results[i], true);
}

// A function of the CUDA runtime: a form named "call.<function>" takes the local addresses of the arguments.
void Decoder::call_external(const Instruction& instruction, std::string_view name, const Operand* results,
                            const Operand* arguments) {
  const std::string opcode = "call." + std::string(name);
  const std::vector<const Form*>& forms = forms_of(opcode);
  if (forms.empty()) {
    throw Unsupported(instruction.place, "a call of the external function " + quote(name) + " is not supported");
  }
  slots_.clear();
  for (const Operand* list : {results, arguments}) {
    if (!list) continue;
    for (const Operand& operand : list->parts) {
      const Symbol* symbol = operand.kind == Operand::Kind::NAME ? lookup(operand.name) : nullptr;
      if (!symbol || symbol->space != Space::LOCAL) throw SyntaxError(operand.place, "expected a .param variable");
      slots_.push_back(constant(symbol->address, true));
    }
  }
  if (slots_.size() > MAX_SLOTS) refuse(instruction);
  Operation operation;
  operation.count[0] = static_cast<uint8_t>(results ? results->parts.size() : 0);
  operation.count[1] = static_cast<uint8_t>(slots_.size() - operation.count[0]);
  operation.slot = slots_.data();
  if (!forms[0]->choose(Chosen({}), operation)) refuse(instruction);
  emit(operation);
}

// Says by name what is not supported.
void Decoder::refuse(const Instruction& instruction) const {
  const std::vector<const Form*>& forms = forms_of(instruction.opcode);
  if (forms.empty()) throw Unsupported(instruction.place, "opcode " + quote(instruction.opcode) + " is not supported");
  const std::string name = quote(full_name(instruction));
  std::string operands;
  for (std::string_view modifier : instruction.modifiers) {
    std::string_view misfit;
    if (std::ranges::none_of(forms, [&](const Form* form) {
          fits(*form, std::span(&modifier, 1), &misfit);
          return misfit.empty();
        })) {
      throw Unsupported(instruction.place,
                        "modifier '." + std::string(modifier) + "' of " + name + " is not supported");
    }
  }
  std::string_view misfit;
  for (const Form* form : forms) {
    if (!fits(*form, instruction.modifiers, &misfit)) continue;
    operands += (operands.empty() ? "" : "' or '") + std::string(form->operands);
  }
  if (operands.empty())
    throw Unsupported(instruction.place, "the modifiers of " + name + " are not supported together");
  throw Unsupported(instruction.place, name + " is not supported with these operands; expected '" + operands +
                                           "', got " + quote(instruction.text));
}

std::unique_ptr<const Program> decode(const Module& module, const Function& kernel) {
  return Decoder(module, kernel).run();
}

}  // namespace sparse24::ptx
