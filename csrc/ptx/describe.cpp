// Modules, kernels and reports as JSON, which sparse24/ptx.py reads, and findings in words. docs/emulator.md defines
// the counters.
#include "csrc/ptx/describe.h"

#include <algorithm>
#include <map>
#include <set>
#include <sstream>
#include <vector>

#include "csrc/ptx/isa.h"
#include "csrc/ptx/json.h"

namespace sparse24::ptx {
namespace {

std::string opcode_of(const Instruction& instruction) {
  std::string name(instruction.opcode);
  for (std::string_view modifier : instruction.modifiers) (name += '.') += modifier;
  return name;
}

// The kernel and the functions that it calls, by the names in its calls.
std::vector<const Function*> reachable(const Module& module, const Function& kernel) {
  std::map<std::string_view, const Function*> by_name;
  for (const Function& function : module.functions) {
    if (!function.is_extern) by_name[function.name] = &function;
  }
  std::vector<const Function*> found{&kernel};
  std::set<const Function*> seen{&kernel};
  for (size_t i = 0; i < found.size(); ++i) {
    for (const Statement& statement : found[i]->body) {
      const auto* instruction = std::get_if<Instruction>(&statement);
      if (instruction == nullptr || instruction->opcode != "call") continue;
      for (const Operand& operand : instruction->operands) {
        const auto callee = by_name.find(operand.name);
        if (callee != by_name.end() && seen.insert(callee->second).second) found.push_back(callee->second);
      }
    }
  }
  return found;
}

bool has_form(const Instruction& instruction) {
  if (instruction.opcode == "call") return true;  // decode.cpp's own
  for (const Form* form : forms_of(instruction.opcode)) {
    std::string_view misfit;
    if (fits(*form, instruction.modifiers, &misfit)) return true;
  }
  return false;
}

const std::vector<std::string> SPACES = [] {
  std::vector<std::string> names;
  for (Space space = Space::GENERIC; space <= Space::LOCAL; space = static_cast<Space>(static_cast<int>(space) + 1)) {
    names.emplace_back(name_of(space));
  }
  return names;
}();

// Where the operation's bytes went. A generic access tells by what it cost.
Space space_of(const Operation& operation, const OperationCounters& counters) {
  if (operation.space != Space::GENERIC) return operation.space;
  if (counters.global_sectors > 0) return Space::GLOBAL;
  return counters.shared_waves > 0 ? Space::SHARED : Space::GENERIC;
}

// The source file that the origin names; empty where the text has no .loc.
std::string_view source_of(const Module& module, const Origin& origin) {
  const bool known = origin.source.file > 0 && origin.source.file < module.files.size();
  return known ? std::string_view(module.files[origin.source.file]) : std::string_view();
}

void place(JsonWriter& json, const Module& module, const Program& program, uint32_t operation) {
  const Origin& origin = program.origins[operation];
  json.field("line", origin.line);
  json.field("column", origin.column);
  json.field("opcode", program.opcodes[origin.opcode]);
  json.field("source_file", source_of(module, origin));
  json.field("source_line", origin.source.line);
}

}  // namespace

uint64_t size_of(const Variable& variable) {
  const uint64_t element = (bits_of(variable.type) + 7) / 8;
  const uint64_t count = variable.elements != 0 ? variable.elements * variable.vector : variable.initializer.size();
  uint64_t size = 0;  // saturated: no variable of such a size is ever made
  const bool overflow = count / variable.vector < variable.elements || __builtin_mul_overflow(element, count, &size);
  return overflow ? ~uint64_t{0} : size;
}

std::string describe(const Module& module) {
  JsonWriter json;
  json.object([&] {
    json.field("target", module.target);
    json.field("version", std::to_string(module.version_major) + "." + std::to_string(module.version_minor));
    json.key("kernels");
    json.array([&] {
      for (const Function& function : module.functions) {
        if (function.is_entry && !function.is_extern) json.value(function.name);
      }
    });
    json.key("variables");
    json.array([&] {
      for (const Variable& variable : module.variables) {
        if (variable.is_extern || (variable.space != Space::GLOBAL && variable.space != Space::CONST)) continue;
        json.object([&] {
          json.field("name", variable.name);
          json.field("space", name_of(variable.space));
          json.field("type", name_of(variable.type));
          json.field("bytes", size_of(variable));
        });
      }
    });
  });
  return json.take();
}

std::string describe(const Module& module, const Function& kernel, const Program* program, const std::string& error) {
  std::map<std::string, uint64_t> instructions, registers;
  std::set<std::string> refused;  // each opcode once, at its first line
  std::vector<std::string> unsupported;
  if (!error.empty()) unsupported.push_back(error);
  for (const Function* function : reachable(module, kernel)) {
    for (const Statement& statement : function->body) {
      if (const auto* variable = std::get_if<Variable>(&statement)) {
        if (variable->space == Space::REGISTER) {
          registers[std::string(name_of(variable->type))] += std::max(variable->count, 1u);
        }
      } else if (const auto* instruction = std::get_if<Instruction>(&statement)) {
        const std::string opcode = opcode_of(*instruction);
        ++instructions[opcode];
        if (has_form(*instruction) || !refused.insert(opcode).second) continue;
        const std::string line = std::string("line ") + std::to_string(instruction->place.line);
        if (error.starts_with(line + ",")) continue;
        unsupported.push_back(line + ": '" + opcode + "' is not supported");
      }
    }
  }
  const auto counts = [](JsonWriter& json, std::string_view name, const std::map<std::string, uint64_t>& map) {
    json.key(name);
    json.object([&] {
      for (const auto& [key, count] : map) json.field(key, count);
    });
  };
  JsonWriter json;
  json.object([&] {
    json.field("name", kernel.name);
    json.field("decoded", program != nullptr);
    json.key("unsupported");
    json.array([&] {
      for (const std::string& reason : unsupported) json.value(reason);
    });
    counts(json, "instructions", instructions);
    counts(json, "registers", registers);
    json.field("max_threads", kernel.max_threads);
    json.field("required_threads", kernel.required_threads);
    json.field("parameter_bytes", program != nullptr ? program->parameter_bytes : 0);
    json.field("shared_bytes", program != nullptr ? program->shared_bytes : 0);
    json.field("local_bytes", program != nullptr ? program->local_bytes : 0);
    json.key("parameters");
    json.array([&] {
      if (program == nullptr) return;
      for (const Parameter& parameter : program->parameters) {
        json.object([&] {
          json.field("name", parameter.name);
          json.field("type", name_of(parameter.type));
          json.field("offset", parameter.offset);
          json.field("size", parameter.size);
          json.field("align", parameter.align);
          json.field("pointer", parameter.pointer);
          json.field("pointer_align", parameter.pointer_align);
        });
      }
    });
  });
  return json.take();
}

std::string describe(const Module& module, const Program& program, const sparse24_ptx_launch& launch,
                     const LaunchResult& result) {
  JsonWriter json;
  json.object([&] {
    json.field("grid", launch.grid);
    json.field("block", launch.block);
    json.field("shared", launch.dynamic_shared);
    json.key("findings");
    json.array([&] {
      for (const Finding& finding : result.findings) {
        json.object([&] {
          json.field("kind", name_of(finding.kind));
          place(json, module, program, finding.operation);
          json.field("block", finding.block);
          json.field("warp", finding.warp);
          json.field("lane", finding.lane);
          json.field("address", finding.address);
          json.field("message", finding.message);
          json.field("count", finding.count);
        });
      }
    });
    // Rows of numbers: a kernel has thousands of instructions. sparse24/ptx.py names the columns.
    json.key("counters");
    json.array([&] {
      for (uint32_t i = 0; i < result.counters.size(); ++i) {
        const OperationCounters& counters = result.counters[i];
        if (program.operations[i].hidden || counters.warps == 0) continue;
        const Origin& origin = program.origins[i];
        json.array([&] {
          for (const uint64_t number :
               {uint64_t{origin.line}, uint64_t{origin.source.file}, uint64_t{origin.source.line},
                uint64_t{origin.opcode}, static_cast<uint64_t>(space_of(program.operations[i], counters)),
                counters.warps, counters.lanes, counters.diverged, counters.shared_waves, counters.shared_ideal,
                counters.global_sectors, counters.global_ideal, counters.bytes}) {
            json.value(number);
          }
        });
      }
    });
    const auto names = [&](std::string_view key, const std::vector<std::string>& strings) {
      json.key(key);
      json.array([&] {
        for (const std::string& name : strings) json.value(name);
      });
    };
    names("opcodes", program.opcodes);
    names("files", module.files);
    names("spaces", SPACES);
    json.field("barriers", result.barriers);
    json.field("instructions", result.instructions);
    json.field("printed", result.printed);
  });
  return json.take();
}

std::string describe(const Module& module, const Program& program, const std::vector<Finding>& findings) {
  constexpr size_t MOST = 5;
  std::ostringstream text;
  for (size_t i = 0; i < std::min(findings.size(), MOST); ++i) {
    const Finding& finding = findings[i];
    const Origin& origin = program.origins[finding.operation];
    const std::string_view source = source_of(module, origin);
    text << (i > 0 ? "\n" : "") << "  " << name_of(finding.kind) << ": line " << origin.line;
    if (!source.empty()) text << " (" << source << ":" << origin.source.line << ")";
    text << ", " << program.opcodes[origin.opcode] << ", block (" << finding.block[0] << ", " << finding.block[1]
         << ", " << finding.block[2] << "), warp " << finding.warp << ", lane " << finding.lane;
    if (finding.address != 0) text << ", address 0x" << std::hex << finding.address << std::dec;
    text << ": " << finding.message;
    if (finding.count > 1) text << " [" << finding.count << " times]";
  }
  if (findings.size() > MOST) text << "\n  and " << findings.size() - MOST << " more";
  return text.str();
}

}  // namespace sparse24::ptx
