// Kernels and variables of a loaded module. Variables keep their contents from launch to launch, as on a device.
#include "csrc/ptx/loaded_module.h"

#include <bit>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#include "csrc/ptx/describe.h"
#include "csrc/ptx/memory.h"

namespace sparse24::ptx {
namespace {

constexpr uint64_t VARIABLE_LIMIT = uint64_t{1} << 30;

bool is_device_variable(const Variable& variable) {
  return variable.space == Space::GLOBAL || variable.space == Space::CONST;
}

std::string quoted(std::string_view name) { return "'" + std::string(name) + "'"; }

// The bits of an initialiser's number as the variable's type has them.
uint64_t converted(const Initializer& word, const Variable& variable) {
  if (word.real_bits == 0) return word.bits;
  const double value =
      word.real_bits == 64 ? std::bit_cast<double>(word.bits) : std::bit_cast<float>(static_cast<uint32_t>(word.bits));
  switch (variable.type) {
    case Type::F32:
      return std::bit_cast<uint32_t>(static_cast<float>(value));
    case Type::F64:
      return std::bit_cast<uint64_t>(value);
    default:
      if (bits_of(variable.type) == word.real_bits) return word.bits;  // .b32 x = 0f3f800000
      throw Unsupported(variable.place, "a real number in the initializer of " + quoted(variable.name) +
                                            ", which is ." + std::string(name_of(variable.type)));
  }
}

}  // namespace

LoadedModule::~LoadedModule() {
  for (const Storage& storage : variables_) {
    if (storage.address != 0) Memory::instance().free(storage.address);
  }
}

const Function& LoadedModule::kernel(std::string_view name) const {
  const Function* declared = nullptr;
  for (const Function& function : tree_->functions) {
    if (!function.is_entry || function.name != name) continue;
    if (!function.is_extern) return function;
    declared = &function;
  }
  if (declared != nullptr) throw std::invalid_argument("kernel " + quoted(name) + " is declared but has no body");
  std::string names;
  for (const Function& function : tree_->functions) {
    if (function.is_entry && !function.is_extern) names += (names.empty() ? "" : ", ") + std::string(function.name);
  }
  throw std::invalid_argument("no kernel " + quoted(name) + "; there is: " + (names.empty() ? "none" : names));
}

const Program& LoadedModule::program(std::string_view name) {
  std::lock_guard lock(mutex_);
  if (const auto it = programs_.find(name); it != programs_.end()) return *it->second;
  return *(programs_[std::string(name)] = decode(*tree_, kernel(name)));
}

const std::string& LoadedModule::description() {
  std::lock_guard lock(mutex_);
  if (description_.empty()) description_ = describe(*tree_);
  return description_;
}

const std::string& LoadedModule::kernel_description(std::string_view name) {
  const Program* decoded = nullptr;
  std::string error;
  try {
    decoded = &program(name);
  } catch (const SyntaxError& reason) {
    error = reason.what();
  }
  std::lock_guard lock(mutex_);
  std::string& text = kernel_descriptions_[std::string(name)];
  if (text.empty()) text = describe(*tree_, kernel(name), decoded, error);
  return text;
}

void* LoadedModule::variable(std::string_view name, size_t& size) {
  std::lock_guard lock(mutex_);
  for (size_t i = 0; i < variables_.size(); ++i) {
    if (tree_->variables[i].name != name || !is_device_variable(tree_->variables[i])) continue;
    const Storage& stored = storage(i);
    size = stored.size;
    return stored.bytes.get();
  }
  return nullptr;
}

std::vector<uint64_t> LoadedModule::addresses(const Program& program) {
  std::lock_guard lock(mutex_);
  std::vector<uint64_t> result(variables_.size(), 0);
  for (const Constant& constant : program.constants) {
    if (constant.variable >= 0) result[constant.variable] = storage(constant.variable).address;
  }
  return result;
}

LoadedModule::Storage& LoadedModule::storage(size_t index) {
  Storage& stored = variables_[index];
  if (stored.address != 0) return stored;
  const Variable& variable = tree_->variables[index];
  if (variable.is_extern) {
    throw Unsupported(variable.place, "extern variable " + quoted(variable.name) + " is defined in another module");
  }
  const uint64_t size = size_of(variable);
  if (size > VARIABLE_LIMIT) throw Unsupported(variable.place, "variables of more than 1 GB are not supported");
  // calloc: what no kernel touches takes no memory. Variables without an initialiser are zero (PTX ISA, "Variables").
  stored.bytes = {static_cast<uint8_t*>(std::calloc(size + 16, 1)), std::free};
  if (stored.bytes == nullptr) throw std::bad_alloc();
  stored.size = size;
  const uint32_t natural = static_cast<uint32_t>((bits_of(variable.type) + 7) / 8) * variable.vector;
  const uint32_t align = std::bit_ceil(std::max({variable.align, natural, 1u}));
  stored.address = Memory::instance().allocate(stored.bytes.get(), size, align, true, variable.space == Space::CONST);
  try {
    initialize(index);  // after the address is known: initialisers may name each other
  } catch (...) {
    Memory::instance().free(stored.address);
    stored = {};
    throw;
  }
  return stored;
}

void LoadedModule::initialize(size_t index) {
  const Variable& variable = tree_->variables[index];
  uint8_t* bytes = variables_[index].bytes.get();
  const uint64_t element = (bits_of(variable.type) + 7) / 8;
  for (const Initializer& word : variable.initializer) {
    const uint64_t at = word.index * element;
    if (at + element > variables_[index].size) {
      throw SyntaxError(variable.place, "more initializers than " + quoted(variable.name) + " has elements");
    }
    uint64_t bits = 0;
    if (word.symbol.empty()) {
      bits = converted(word, variable);
    } else {
      size_t named = 0;
      while (named < variables_.size() && tree_->variables[named].name != word.symbol) ++named;
      if (named == variables_.size() || !is_device_variable(tree_->variables[named])) {
        throw Unsupported(variable.place,
                          "the address of " + quoted(word.symbol) + " in the initializer of " + quoted(variable.name));
      }
      bits = storage(named).address + word.bits;
      if (word.mask_byte != 0) bits = bits >> (8 * (word.mask_byte - 1)) & 0xff;
    }
    std::memcpy(bytes + at, &bits, std::min<uint64_t>(element, 8));  // little-endian, as the host is
  }
}

}  // namespace sparse24::ptx
