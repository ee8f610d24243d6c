// The table of forms: matching of modifiers, and the table as a document.
#include "csrc/ptx/isa.h"

#include <algorithm>
#include <unordered_map>

namespace sparse24::ptx {
namespace {

struct Group {
  std::vector<std::string_view> alternatives;
  bool optional = false;
};

std::vector<std::string_view> split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  while (!text.empty()) {
    const size_t end = std::min(text.find(separator), text.size());
    if (end > 0) parts.push_back(text.substr(0, end));
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return parts;
}

std::vector<Group> groups_of(std::string_view modifiers) {
  std::vector<Group> groups;
  for (std::string_view part : split(modifiers, ' ')) {
    Group group;
    group.optional = part.ends_with('?');
    if (group.optional) part.remove_suffix(1);
    group.alternatives = split(part, '|');
    groups.push_back(std::move(group));
  }
  return groups;
}

bool has(const Group& group, std::string_view modifier) {
  return std::ranges::any_of(group.alternatives, [&](std::string_view alternative) {
    return alternative.ends_with('*') ? modifier.starts_with(alternative.substr(0, alternative.size() - 1))
                                      : modifier == alternative;
  });
}

struct Table {
  std::vector<const Form*> all;
  std::unordered_map<std::string_view, std::vector<const Form*>> by_opcode;
  std::unordered_map<const Form*, std::vector<Group>> groups;

  Table() {
    for (const Forms& family : {integer_forms(), logic_forms(), move_forms(), float_forms(), half_forms(),
                                convert_forms(), memory_forms(), warp_forms(), control_forms(), tensor_forms()}) {
      for (const Form& form : family) {
        all.push_back(&form);
        by_opcode[form.opcode].push_back(&form);
        groups[&form] = groups_of(form.modifiers);
      }
    }
  }
  static const Table& get() {
    static const Table table;
    return table;
  }
};

}  // namespace

bool Chosen::has(std::string_view modifier) const {
  return std::ranges::find(modifiers_, modifier) != modifiers_.end();
}

int Chosen::one_of(std::initializer_list<std::string_view> names, int otherwise) const {
  int index = 0;
  for (std::string_view name : names) {
    if (has(name)) return index;
    ++index;
  }
  return otherwise;
}

Type Chosen::type(int n) const {
  for (std::string_view modifier : modifiers_) {
    const Type type = type_named(modifier);
    if (type != Type::NONE && n-- == 0) return type;
  }
  return Type::NONE;
}

int Chosen::number(std::string_view prefix, int otherwise) const {
  for (std::string_view modifier : modifiers_) {
    if (!modifier.starts_with(prefix) || modifier.size() == prefix.size()) continue;
    int value = 0;
    bool digits = true;
    for (const char c : modifier.substr(prefix.size())) {
      digits = digits && c >= '0' && c <= '9';
      value = value * 10 + (c - '0');
    }
    if (digits) return value;
  }
  return otherwise;
}

std::string_view Chosen::starting(std::string_view prefix) const {
  for (std::string_view modifier : modifiers_) {
    if (modifier.starts_with(prefix)) return modifier;
  }
  return "";
}

const std::vector<const Form*>& all_forms() { return Table::get().all; }

const std::vector<const Form*>& forms_of(std::string_view opcode) {
  static const std::vector<const Form*> none;
  const auto& table = Table::get().by_opcode;
  const auto it = table.find(opcode);
  return it == table.end() ? none : it->second;
}

bool fits(const Form& form, std::span<const std::string_view> modifiers, std::string_view* misfit) {
  const std::vector<Group>& groups = Table::get().groups.at(&form);
  std::vector<bool> taken(groups.size(), false);
  *misfit = "";
  size_t types_from = 0;  // types go to groups in order
  for (std::string_view modifier : modifiers) {
    const bool is_type = type_named(modifier) != Type::NONE;
    size_t i = is_type ? types_from : 0;
    while (i < groups.size() && (taken[i] || !has(groups[i], modifier))) ++i;
    if (i == groups.size()) {
      *misfit = modifier;
      return false;
    }
    taken[i] = true;
    if (is_type) types_from = i + 1;
  }
  for (size_t i = 0; i < groups.size(); ++i) {
    if (!taken[i] && !groups[i].optional) return false;
  }
  return true;
}

std::string supported_instructions() {
  std::vector<const Form*> forms = all_forms();
  std::ranges::stable_sort(forms, {}, [](const Form* form) { return form->opcode; });
  std::string text = "| opcode | modifiers | operands |\n| --- | --- | --- |\n";
  for (const Form* form : forms) {
    std::string modifiers;
    for (const Group& group : groups_of(form->modifiers)) {
      std::string alternatives;
      for (std::string_view alternative : group.alternatives) {
        alternatives += (alternatives.empty() ? "." : " .") + std::string(alternative);
      }
      const bool choice = group.alternatives.size() > 1;
      if (!modifiers.empty()) modifiers += ' ';
      modifiers += group.optional ? "[" + alternatives + "]" : choice ? "(" + alternatives + ")" : alternatives;
    }
    std::string operands(form->operands);
    for (size_t at = 0; (at = operands.find('|', at)) != std::string::npos; at += 2) operands.replace(at, 1, "\\|");
    text += "| " + std::string(form->opcode) + " | " + modifiers + " | " + operands + " |\n";
  }
  return text;
}

}  // namespace sparse24::ptx
