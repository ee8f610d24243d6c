// Registers, variables and where they lie: shared variables at fixed offsets, a frame of local memory for each
// function.
#include <algorithm>
#include <charconv>

#include "csrc/ptx/decoder.h"

namespace sparse24::ptx {
namespace {

uint64_t align_up(uint64_t value, uint64_t align) { return (value + align - 1) / align * align; }

}  // namespace

uint64_t Decoder::bytes_of(const Variable& variable) {
  return static_cast<uint64_t>((bits_of(variable.type) + 7) / 8) * variable.vector * variable.elements;
}

uint32_t Decoder::align_of(const Variable& variable) {
  const uint32_t natural = static_cast<uint32_t>((bits_of(variable.type) + 7) / 8) * variable.vector;
  return std::max({variable.align, natural, 1u});
}

Slot Decoder::new_slot(Type type) {
  constexpr uint32_t LIMIT = uint32_t{1} << 28;  // bytes of a warp's registers: a million and more of them
  const Slot slot = program_->register_bytes;
  if (slot > LIMIT) throw Unsupported(function_->place, "a kernel of more than 256 MB of registers is not supported");
  const uint32_t bytes = type == Type::PRED ? 64 : bits_of(type) == 64 ? 256 : 128;
  slot_widths_[slot] = bytes;
  program_->register_bytes += bytes;
  return slot;
}

// Frames are disjoint, since functions do not recurse. In one, the .param variables of calls come first, and scopes
// give their space back; .local variables come last, so that what runs past their end leaves the frame.
uint32_t Decoder::frame_space(uint32_t& used, uint64_t bytes, uint32_t align) {
  constexpr uint64_t LIMIT = 512 * 1024;  // PTX ISA: local memory of a thread
  const uint64_t at = align_up(used, align);
  if (bytes > LIMIT || at + bytes > LIMIT) {
    throw SyntaxError(function_->place,
                      "'" + std::string(function_->name) + "' needs more than 512 KB of local memory");
  }
  used = static_cast<uint32_t>(at + bytes);
  program_->local_bytes = std::max(program_->local_bytes, used);
  return static_cast<uint32_t>(at);
}

void Decoder::begin_frame(const Function& function) {
  params_used_ = local_used_ = program_->local_bytes;
  std::vector<uint32_t> open;
  const auto add = [&](const Variable& variable) {
    if (variable.space != Space::PARAM || function.is_entry) return;
    frame_space(local_used_, bytes_of(variable), align_of(variable));
  };
  for (const Variable& variable : function.results) add(variable);
  for (const Variable& variable : function.parameters) add(variable);
  uint32_t used = local_used_;
  for (const Statement& statement : function.body) {
    if (std::holds_alternative<ScopeBegin>(statement)) {
      open.push_back(used);
    } else if (std::holds_alternative<ScopeEnd>(statement)) {
      used = open.back();
      open.pop_back();
    } else if (const auto* variable = std::get_if<Variable>(&statement); variable && variable->space == Space::PARAM) {
      frame_space(used, bytes_of(*variable), align_of(*variable));
      local_used_ = std::max(local_used_, used);
    }
  }
}

void Decoder::add_symbol(const Variable& variable, const Symbol& symbol) {
  if (!scopes_.back().symbols.try_emplace(variable.name, symbol).second) {
    throw SyntaxError(variable.place, "'" + std::string(variable.name) + "' is declared twice");
  }
}

void Decoder::declare(const Variable& variable) {
  if (variable.space == Space::REGISTER) {
    if (variable.type == Type::B128 || variable.vector != 1) {
      throw Unsupported(variable.place, "registers of type ." + std::string(name_of(variable.type)) +
                                            (variable.vector != 1 ? " vectors" : "") + " are not supported");
    }
    if (variable.count == 0) {
      add_symbol(variable, {Symbol::Kind::REGISTER, variable.type, new_slot(variable.type), Space::REGISTER, 0, -1, 0});
    } else if (!scopes_.back().ranges.try_emplace(variable.name, RegisterRange{variable.type, variable.count}).second) {
      throw SyntaxError(variable.place, "'" + std::string(variable.name) + "' is declared twice");
    }
    return;
  }
  if (variable.space == Space::SHARED) return;  // declare_shared has done it
  if (variable.space != Space::LOCAL && variable.space != Space::PARAM) {
    throw Unsupported(variable.place,
                      "a variable of space ." + std::string(name_of(variable.space)) + " in a function");
  }
  const uint64_t bytes = bytes_of(variable);
  const uint32_t at =
      frame_space(variable.space == Space::PARAM ? params_used_ : local_used_, bytes, align_of(variable));
  add_symbol(variable, {Symbol::Kind::VARIABLE, variable.type, NO_SLOT, Space::LOCAL, at, -1, bytes});
}

// Shared variables of the functions and those of the module that they name; extern arrays share the dynamic part.
void Decoder::declare_shared() {
  uint64_t used = 0;
  uint32_t dynamic_align = 1;
  std::vector<std::string_view> dynamic;
  const auto place = [&](const Variable& variable) {
    if (variable.space != Space::SHARED) return;
    const bool is_dynamic = variable.is_extern || variable.elements == 0;
    if (shared_.contains(variable.name)) {
      if (is_dynamic && std::ranges::find(dynamic, variable.name) != dynamic.end()) return;
      throw Unsupported(variable.place,
                        "two shared variables of the name '" + std::string(variable.name) + "' are not supported");
    }
    const uint32_t align = align_of(variable);
    Symbol symbol{Symbol::Kind::VARIABLE, variable.type, NO_SLOT, Space::SHARED, 0, -1, bytes_of(variable)};
    if (is_dynamic) {
      dynamic_align = std::max(dynamic_align, align);
      dynamic.push_back(variable.name);
    } else {
      symbol.address = align_up(used, align);
      used = symbol.address + symbol.bytes;
      if (used > 1 << 24) throw SyntaxError(variable.place, "shared variables of more than 16 MB");
    }
    shared_[variable.name] = symbol;
  };
  for (const Variable& variable : module_.variables) {
    if (used_names_.contains(variable.name)) place(variable);
  }
  for (const Function* function : order_) {
    for (const Statement& statement : function->body) {
      if (const auto* variable = std::get_if<Variable>(&statement)) place(*variable);
    }
  }
  program_->shared_bytes = static_cast<uint32_t>(used);
  program_->dynamic_offset = static_cast<uint32_t>(align_up(used, dynamic_align));
  for (std::string_view name : dynamic) shared_[name].address = program_->dynamic_offset;
}

void Decoder::declare_parameters(const Function& function) {
  if (function.is_entry) {
    for (const Variable& variable : function.parameters) {
      const uint32_t offset = static_cast<uint32_t>(align_up(program_->parameter_bytes, align_of(variable)));
      const uint64_t bytes = bytes_of(variable);
      if (offset + bytes > 32764) {  // PTX ISA, "Kernel Function Parameters"
        throw SyntaxError(variable.place, "kernel parameters of more than 32,764 bytes");
      }
      program_->parameters.push_back({std::string(variable.name), variable.type, offset, static_cast<uint32_t>(bytes),
                                      align_of(variable), variable.pointer, variable.pointer_align});
      program_->parameter_bytes = static_cast<uint32_t>(offset + bytes);
      add_symbol(variable, {Symbol::Kind::VARIABLE, variable.type, NO_SLOT, Space::PARAM, offset, -1, bytes});
    }
    return;
  }
  CallTarget& target = targets_[function.name];
  for (const auto& [variables, symbols] :
       {std::pair{&function.results, &target.results}, std::pair{&function.parameters, &target.parameters}}) {
    for (const Variable& variable : *variables) {
      declare(variable);
      symbols->push_back(scopes_.back().symbols.at(variable.name));
    }
  }
}

const Symbol* Decoder::lookup(std::string_view name) {
  for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
    if (const auto it = scope->symbols.find(name); it != scope->symbols.end()) return &it->second;
    // name<count>: the number may follow a prefix that ends in digits itself.
    for (size_t at = name.size(); at > 1 && name[at - 1] >= '0' && name[at - 1] <= '9';) {
      const auto range = scope->ranges.find(name.substr(0, --at));
      if (range == scope->ranges.end()) continue;
      uint32_t number = 0;
      const char* end = name.data() + name.size();
      const bool canonical = name.size() - at == 1 || name[at] != '0';
      if (std::from_chars(name.data() + at, end, number).ec != std::errc() || !canonical) continue;
      const auto& [type, count] = range->second;
      if (number >= count) continue;
      // Its slot comes with its first use: a family may be declared far larger than it is.
      const Symbol symbol{Symbol::Kind::REGISTER, type, new_slot(type), Space::REGISTER, 0, -1, 0};
      return &(scope->symbols[name] = symbol);
    }
  }
  if (const auto it = shared_.find(name); it != shared_.end()) return &it->second;
  for (size_t i = 0; i < module_.variables.size(); ++i) {
    const Variable& variable = module_.variables[i];
    if (variable.name != name || variable.space == Space::SHARED) continue;
    Symbol symbol{Symbol::Kind::VARIABLE,  variable.type,     NO_SLOT, variable.space, 0,
                  static_cast<int32_t>(i), bytes_of(variable)};
    return &(scopes_.front().symbols[name] = symbol);
  }
  return nullptr;
}

}  // namespace sparse24::ptx
