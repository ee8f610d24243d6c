// Operands to slots. Where a register is wider or narrower than the instruction's type, which PTX allows for ld, st and
// cvt, hidden operations before and after convert, so that a handler sees slots of its own types.
#include <bit>
#include <cmath>
#include <unordered_map>

#include "csrc/ptx/decoder.h"

namespace sparse24::ptx {
namespace {

bool is_float(Type type) { return type == Type::F32 || type == Type::F64; }
bool is_wide(Type type) { return bits_of(type) == 64; }

Type doubled(Type type) {
  switch (type) {
    case Type::U16:
      return Type::U32;
    case Type::S16:
      return Type::S32;
    case Type::U32:
      return Type::U64;
    case Type::S32:
      return Type::S64;
    default:
      return type;
  }
}

std::vector<OperandRule> parse_rules(std::string_view text) {
  std::vector<OperandRule> rules;
  while (!text.empty()) {
    const size_t end = std::min(text.find(", "), text.size());
    std::string_view item = text.substr(0, end);
    text.remove_prefix(std::min(end + 2, text.size()));
    OperandRule rule;
    if (item.starts_with('=')) rule.result = true, item.remove_prefix(1);
    if (item.ends_with("|p?")) {
      rule.pair_predicate = true, item.remove_suffix(3);
    } else if (item.ends_with('?')) {
      rule.optional = true, item.remove_suffix(1);
    }
    if (item.starts_with('*')) rule.kind = OperandRule::Kind::VECTOR, item.remove_prefix(1);
    if (item == "p" || item == "!p") {
      rule.kind = OperandRule::Kind::PREDICATE;
      rule.negatable = item == "!p";
    } else if (item == "[a]") {
      rule.kind = OperandRule::Kind::ADDRESS;
    } else if (item == "i") {
      rule.kind = OperandRule::Kind::IMMEDIATE;
    } else if (item == "m") {
      rule.kind = OperandRule::Kind::MASK;
      rule.type = Type::U32;
    } else if (item == "label") {
      rule.kind = OperandRule::Kind::LABEL;
    } else if (item == "labels") {
      rule.kind = OperandRule::Kind::LABELS;
    } else if (item[0] >= '0' && item[0] <= '9') {
      rule.type_index = item[0] - '0';
      rule.doubled = item.ends_with('w');
    } else {
      rule.type = type_named(item);
    }
    rules.push_back(rule);
  }
  return rules;
}

const std::unordered_map<std::string_view, Special>& special_names() {
  using enum Special;
  static const std::unordered_map<std::string_view, Special> names{
      {"%tid.x", TID_X},
      {"%tid.y", TID_Y},
      {"%tid.z", TID_Z},
      {"%ntid.x", NTID_X},
      {"%ntid.y", NTID_Y},
      {"%ntid.z", NTID_Z},
      {"%ctaid.x", CTAID_X},
      {"%ctaid.y", CTAID_Y},
      {"%ctaid.z", CTAID_Z},
      {"%nctaid.x", NCTAID_X},
      {"%nctaid.y", NCTAID_Y},
      {"%nctaid.z", NCTAID_Z},
      {"%laneid", LANEID},
      {"%warpid", WARPID},
      {"%nwarpid", NWARPID},
      {"%smid", SMID},
      {"%nsmid", NSMID},
      {"%gridid", GRIDID},
      {"%lanemask_eq", LANEMASK_EQ},
      {"%lanemask_le", LANEMASK_LE},
      {"%lanemask_lt", LANEMASK_LT},
      {"%lanemask_ge", LANEMASK_GE},
      {"%lanemask_gt", LANEMASK_GT},
      {"%dynamic_smem_size", DYNAMIC_SMEM_SIZE},
      {"%total_smem_size", TOTAL_SMEM_SIZE},
      {"%aggr_smem_size", AGGR_SMEM_SIZE},
      {"%cluster_ctaid.x", CLUSTER_CTAID_X},
      {"%cluster_ctaid.y", CLUSTER_CTAID_Y},
      {"%cluster_ctaid.z", CLUSTER_CTAID_Z},
      {"%cluster_nctaid.x", CLUSTER_NCTAID_X},
      {"%cluster_nctaid.y", CLUSTER_NCTAID_Y},
      {"%cluster_nctaid.z", CLUSTER_NCTAID_Z},
      {"%cluster_ctarank", CLUSTER_CTARANK},
      {"%cluster_nctarank", CLUSTER_NCTARANK},
      {"%clusterid.x", CLUSTERID_X},
      {"%clusterid.y", CLUSTERID_Y},
      {"%clusterid.z", CLUSTERID_Z},
      {"%nclusterid.x", NCLUSTERID_X},
      {"%nclusterid.y", NCLUSTERID_Y},
      {"%nclusterid.z", NCLUSTERID_Z},
  };
  return names;
}

}  // namespace

const std::vector<OperandRule>& rules_of(const Form& form) {
  static const auto rules = [] {
    std::unordered_map<const Form*, std::vector<OperandRule>> all;
    for (const Form* one : all_forms()) all[one] = parse_rules(one->operands);
    return all;
  }();
  return rules.at(&form);
}

Slot Decoder::constant(uint64_t bits, bool wide, int32_t variable) {
  if (!wide) bits &= 0xffffffffu;
  const auto [it, fresh] = constants_.try_emplace({bits, wide, variable}, NO_SLOT);
  if (fresh) {
    it->second = new_slot(wide ? Type::B64 : Type::B32);
    program_->constants.push_back({it->second, wide, bits, variable});
  }
  return it->second;
}

// A predicate's mask is a 32-bit value that only lane 0 of its slot holds: any 32-bit constant serves.
Slot Decoder::predicate_constant(bool value) { return constant(value ? ~0u : 0u, false); }

// The bits of an immediate as a value of `type`, zero-extended.
uint64_t Decoder::immediate(const Operand& operand, Type type) const {
  uint64_t bits = operand.bits;
  if (operand.kind == Operand::Kind::REAL) {
    if (type == Type::F32 && operand.real_bits == 64) {
      bits = std::bit_cast<uint32_t>(static_cast<float>(std::bit_cast<double>(bits)));
    } else if (type == Type::F64 && operand.real_bits == 32) {
      bits = std::bit_cast<uint64_t>(static_cast<double>(std::bit_cast<float>(static_cast<uint32_t>(bits))));
    } else if (operand.real_bits != bits_of(type)) {
      throw SyntaxError(operand.place, "a floating-point immediate of " + std::to_string(operand.real_bits) +
                                           " bits cannot be a ." + std::string(name_of(type)));
    }
  } else if (is_float(type) && bits != 0) {
    throw SyntaxError(operand.place, "an integer immediate cannot be a ." + std::string(name_of(type)));
  }
  const int width = bits_of(type);
  return width >= 64 ? bits : bits & ((uint64_t{1} << width) - 1);
}

Slot Decoder::special(std::string_view name) {
  if (name == "WARP_SZ") return constant(LANES, false);
  if (const auto it = specials_.find(name); it != specials_.end()) return it->second;
  if (const auto it = special_names().find(name); it != special_names().end()) {
    const bool wide = it->second == Special::GRIDID;
    const Slot slot = new_slot(wide ? Type::B64 : Type::B32);
    program_->specials.push_back({slot, wide, it->second});
    return specials_[name] = slot;
  }
  const bool low = name == "%clock" || name == "%globaltimer_lo",
             high = name == "%clock_hi" || name == "%globaltimer_hi";
  if (low || high || name == "%clock64" || name == "%globaltimer") {
    const bool wide = !low && !high;
    const Slot slot = new_slot(wide ? Type::B64 : Type::B32);
    Operation read = hidden(wide ? hidden::clock_wide : hidden::clock, {slot});
    read.immediate = high ? 32 : 0;
    before_.push_back(read);
    return slot;
  }
  return NO_SLOT;
}

Slot Decoder::source(const Operand& operand, Type type) {
  const bool wide = is_wide(type);
  switch (operand.kind) {
    case Operand::Kind::INTEGER:
    case Operand::Kind::REAL:
      return constant(immediate(operand, type), wide);
    case Operand::Kind::NAME:
      break;
    default:
      throw SyntaxError(operand.place, "expected a register or an immediate of type ." + std::string(name_of(type)));
  }
  Slot slot = NO_SLOT;
  Type held = Type::NONE;
  bool is_special = false;
  if (const Symbol* symbol = lookup(operand.name)) {
    if (symbol->kind == Symbol::Kind::VARIABLE) {
      // The address of a variable.
      if (bits_of(type) < 32 || operand.negated) {
        throw SyntaxError(operand.place, "the address of '" + std::string(operand.name) + "' cannot be a ." +
                                             std::string(name_of(type)));
      }
      return constant(symbol->address + static_cast<uint64_t>(operand.offset), wide, symbol->module_variable);
    }
    slot = symbol->slot;
    held = symbol->type;
  } else if (operand.name.starts_with('%') || operand.name == "WARP_SZ") {
    slot = special(operand.name);
    is_special = true;
    if (slot == NO_SLOT) {
      throw SyntaxError(operand.place, "'" + std::string(operand.name) +
                                           "' is neither a declared register nor a "
                                           "special register that is supported");
    }
    const bool wide_special = operand.name == "%gridid" || operand.name == "%clock64" || operand.name == "%globaltimer";
    held = wide_special ? Type::B64 : Type::B32;
    if (wide && !wide_special) {
      const Slot widened = new_slot(Type::B64);
      before_.push_back(hidden(hidden::widen_unsigned, {widened, slot}));
      return widened;
    }
  } else {
    throw SyntaxError(operand.place,
                      functions_.contains(operand.name)
                          ? "the address of function '" + std::string(operand.name) + "' is not supported"
                          : "'" + std::string(operand.name) + "' is not declared");
  }
  if (held == Type::PRED) {
    throw SyntaxError(operand.place,
                      "'" + std::string(operand.name) + "' is a predicate; expected ." + std::string(name_of(type)));
  }
  if (operand.offset != 0 || operand.negated) {
    throw SyntaxError(operand.place, "'" + std::string(operand.name) + "' is a register: no offset or negation here");
  }
  if (!is_special && !may_be_wider() && bits_of(held) != bits_of(type)) {
    throw SyntaxError(operand.place, "'" + std::string(operand.name) + "' has " + std::to_string(bits_of(held)) +
                                         " bits; expected ." + std::string(name_of(type)));
  }
  if (wide && !is_wide(held)) {
    throw SyntaxError(operand.place, "'" + std::string(operand.name) + "' has " + std::to_string(bits_of(held)) +
                                         " bits; expected ." + std::string(name_of(type)));
  }
  if (!wide && is_wide(held)) {
    const Slot narrow = new_slot(Type::B32);
    before_.push_back(hidden(hidden::narrow, {narrow, slot}));
    slot = narrow;
    held = Type::B32;
  }
  if (!wide && bits_of(held) > bits_of(type) && bits_of(type) < 32 && instruction_->opcode == "cvt") {
    const Slot low = new_slot(Type::B32);
    Operation extend = hidden(hidden::extend_unsigned, {low, slot});
    extend.immediate = bits_of(type);
    before_.push_back(extend);
    slot = low;
  }
  return slot;
}

// PTX ISA, "Operand Size Exceeding Instruction-Type Size".
bool Decoder::may_be_wider() const {
  const std::string_view opcode = instruction_->opcode;
  return opcode == "ld" || opcode == "ldu" || opcode == "st" || opcode == "cvt";
}

Slot Decoder::result(const Operand& operand, Type type) {
  // `_`: a slot that nobody reads, where the ISA lets a result be left out: parts of vectors and pairs, atom.
  const std::string_view opcode = instruction_->opcode;
  if (operand.kind == Operand::Kind::SINK && (opcode == "ld" || opcode == "mov" || opcode == "atom" || in_pair_)) {
    return new_slot(type);
  }
  const Symbol* symbol = operand.kind == Operand::Kind::NAME ? lookup(operand.name) : nullptr;
  if (!symbol || symbol->kind != Symbol::Kind::REGISTER || symbol->type == Type::PRED || operand.offset != 0 ||
      operand.negated) {
    throw SyntaxError(operand.place, "expected a register of type ." + std::string(name_of(type)) + " for the result" +
                                         (operand.name.empty() ? "" : "; got '" + std::string(operand.name) + "'"));
  }
  const int held = bits_of(symbol->type), width = bits_of(type);
  if (held < width || (held > width && !may_be_wider())) {
    throw SyntaxError(operand.place, "'" + std::string(operand.name) + "' has " + std::to_string(held) +
                                         " bits; the result is ." + std::string(name_of(type)));
  }
  if (held == 64 && width < 64) {
    const Slot narrow = new_slot(Type::B32);
    if (is_signed(type) && width < 32) {
      Operation extend = hidden(hidden::extend_signed, {narrow, narrow});
      extend.immediate = width;
      after_.push_back(extend);
    }
    after_.push_back(hidden(is_signed(type) ? hidden::widen_signed : hidden::widen_unsigned, {symbol->slot, narrow}));
    return narrow;
  }
  if (is_signed(type) && width < 32 && held > width) {
    Operation extend = hidden(hidden::extend_signed, {symbol->slot, symbol->slot});
    extend.immediate = width;
    after_.push_back(extend);
    if (held == 16) {  // 8 bits into 16: the slot stays zero-extended
      Operation cut = hidden(hidden::extend_unsigned, {symbol->slot, symbol->slot});
      cut.immediate = 16;
      after_.push_back(cut);
    }
  }
  return symbol->slot;
}

Slot Decoder::predicate_source(const Operand& operand) {
  if (operand.kind == Operand::Kind::INTEGER) return predicate_constant(operand.bits != 0);
  const Symbol* symbol = operand.kind == Operand::Kind::NAME ? lookup(operand.name) : nullptr;
  if (!symbol || symbol->kind != Symbol::Kind::REGISTER || symbol->type != Type::PRED || operand.offset != 0) {
    throw SyntaxError(operand.place, "expected a predicate");
  }
  if (!operand.negated) return symbol->slot;
  const Slot negated = new_slot(Type::PRED);
  before_.push_back(hidden(hidden::negate, {negated, symbol->slot}));
  return negated;
}

Slot Decoder::predicate_result(const Operand& operand) {
  if (operand.kind == Operand::Kind::SINK) return NO_SLOT;
  const Symbol* symbol = operand.kind == Operand::Kind::NAME ? lookup(operand.name) : nullptr;
  if (!symbol || symbol->kind != Symbol::Kind::REGISTER || symbol->type != Type::PRED || operand.offset != 0 ||
      operand.negated) {
    throw SyntaxError(operand.place, "expected a predicate for the result");
  }
  return symbol->slot;
}

bool Decoder::address(const Operand& operand, Operation& operation) {
  if (operand.kind != Operand::Kind::ADDRESS || !operand.parts.empty()) return false;
  if (addresses_ == 2) return false;
  const int index = addresses_++;
  int64_t& offset = operation.offset[index];
  offset = operand.offset;
  uint8_t wide = 1;
  Slot slot = NO_SLOT;
  if (operand.name.empty()) {
    offset += static_cast<int64_t>(operand.bits);
    slot = constant(0, true);
  } else if (const Symbol* symbol = lookup(operand.name)) {
    if (symbol->kind == Symbol::Kind::REGISTER) {
      if (symbol->type == Type::PRED || bits_of(symbol->type) < 32) {
        throw SyntaxError(operand.place, "an address needs a register of 32 or 64 bits");
      }
      slot = symbol->slot;
      wide = is_wide(symbol->type);
      // Inside a device function, and for the arguments of calls, .param is a place in local memory.
      if (index == 0 && operation.space == Space::PARAM && (!function_->is_entry || instruction_->opcode == "st")) {
        operation.space = Space::LOCAL;
      }
    } else {
      slot = constant(symbol->module_variable >= 0 ? 0 : symbol->address, true, symbol->module_variable);
      const bool parameter_in_local = operation.space == Space::PARAM && symbol->space == Space::LOCAL;
      // The generic address of a global or const variable is its address; the windows of the others are not added here.
      const bool generic = operation.space == Space::GENERIC && symbol->module_variable >= 0;
      if (index == 0 && operation.space != symbol->space && !parameter_in_local && !generic) {
        throw SyntaxError(operand.place, "'" + std::string(operand.name) + "' lies in ." +
                                             std::string(name_of(symbol->space)) + ", not in ." +
                                             std::string(name_of(operation.space)));
      }
      if (parameter_in_local) operation.space = Space::LOCAL;
    }
  } else {
    throw SyntaxError(operand.place, "'" + std::string(operand.name) + "' is not declared");
  }
  operation.address_wide[index] = wide;
  slots_.push_back(slot);
  return true;
}

bool Decoder::operand(const OperandRule& rule, const Operand& operand, Type type, Operation& operation) {
  using Kind = OperandRule::Kind;
  if (rule.doubled) type = doubled(type);
  const Operand* value = &operand;
  if (rule.pair_predicate && operand.kind == Operand::Kind::PAIR) value = &operand.parts[0];
  switch (rule.kind) {
    case Kind::VALUE:
    case Kind::MASK: {
      if (value->kind == Operand::Kind::VECTOR || value->kind == Operand::Kind::ADDRESS) return false;
      if (type == Type::NONE) return false;
      in_pair_ = value != &operand;
      const Slot slot = rule.result ? result(*value, type) : source(*value, type);
      in_pair_ = false;
      if (rule.kind == Kind::MASK) operation.mask = slot, operation.presence = Presence::MASK;
      slots_.push_back(slot);
      break;
    }
    case Kind::PREDICATE: {
      if (value->negated && !rule.negatable) return false;
      slots_.push_back(rule.result ? predicate_result(*value) : predicate_source(*value));
      break;
    }
    case Kind::VECTOR: {
      if (value->kind != Operand::Kind::VECTOR) {
        if (value->kind == Operand::Kind::ADDRESS) return false;
        slots_.push_back(rule.result ? result(*value, type) : source(*value, type));
        break;
      }
      if (value->parts.empty() || value->parts.size() > 255) return false;
      // mov's vectors share the bits of the scalar; all others are of the type itself.
      if (instruction_->opcode == "mov") {
        const int bits = bits_of(type) / static_cast<int>(value->parts.size());
        type = bits == 8 ? Type::B8 : bits == 16 ? Type::B16 : bits == 32 ? Type::B32 : Type::B64;
      }
      for (const Operand& part : value->parts) {
        const bool left_out = part.kind == Operand::Kind::SINK && !rule.result && instruction_->opcode == "st";
        slots_.push_back(left_out ? NO_SLOT : rule.result ? result(part, type) : source(part, type));
      }
      break;
    }
    case Kind::ADDRESS:
      return address(operand, operation);
    case Kind::IMMEDIATE:
      if (operand.kind != Operand::Kind::INTEGER) return false;
      operation.immediate = static_cast<int64_t>(operand.bits);
      slots_.push_back(constant(operand.bits, false));
      break;
    case Kind::LABEL:
      if (operand.kind != Operand::Kind::NAME || operand.offset != 0 || operand.negated) return false;
      operation.target = 0;  // set when the label's place is known
      break;
    case Kind::LABELS:
      if (operand.kind != Operand::Kind::NAME) return false;
      break;
  }
  if (rule.pair_predicate) {
    slots_.push_back(operand.kind == Operand::Kind::PAIR ? predicate_result(operand.parts[1]) : NO_SLOT);
  }
  return true;
}

}  // namespace sparse24::ptx
