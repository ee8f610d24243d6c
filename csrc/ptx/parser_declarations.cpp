// What stands outside of functions: headers, variables, parameters. Source: PTX ISA, "Directives".
#include <algorithm>
#include <charconv>

#include "csrc/ptx/parser.h"

namespace sparse24::ptx {
namespace {

constexpr uint64_t MAX_BYTES = uint64_t{1} << 36;  // of a variable: the room an allocation has (memory.h)
constexpr size_t MAX_EXTENTS = 16;                 // of an array; so deep do the braces of its initialiser nest

}  // namespace

bool Parser::space_named(std::string_view name, Space& space) {
  for (const Space one : {Space::PARAM, Space::CONST, Space::GLOBAL, Space::SHARED, Space::LOCAL}) {
    if (name == name_of(one)) {
      space = one;
      return true;
    }
  }
  return false;
}

// .version 9.0, .target sm_80, ..., .address_size 64
void Parser::header() {
  if (!accept("version")) fail("'.version' at the beginning");
  const Token& version = next();
  const std::string_view text = version.text;
  const size_t dot = std::min(text.find('.'), text.size());
  const auto number = [&](std::string_view digits, int& value) {
    return !digits.empty() && std::from_chars(digits.data(), digits.data() + digits.size(), value).ec == std::errc();
  };
  if (version.kind != Token::Kind::REAL || !number(text.substr(0, dot), module_.version_major) ||
      !number(text.substr(std::min(dot + 1, text.size())), module_.version_minor)) {
    fail_at(version, "expected a version such as 8.5; got " + quote(text));
  }
  if (!accept("target")) fail("'.target'");
  module_.target = expect_name("a target such as sm_80");
  while (accept(',')) expect_name("a target option");
  if (accept("address_size")) {
    const Token& size = peek();
    if (expect_integer("64") != 64) fail_at(size, "only 64-bit addresses are supported");
  }
}

void Parser::skip_to_semicolon() {
  while (!accept(';')) {
    if (peek().kind == Token::Kind::END) fail("';'");
    next();
  }
}

// .file number "name" [, time, size]
void Parser::file() {
  const uint32_t number = expect_small("the number of .file", 1 << 16);
  if (peek().kind != Token::Kind::STRING) fail("the name of a file");
  if (module_.files.size() <= number) module_.files.resize(number + 1);
  module_.files[number] = next().text;
  for (int i = 0; i < 2 && accept(','); ++i) expect_integer("a number");
}

// .section name { debugging information }
void Parser::section() {
  if (peek().kind != Token::Kind::DOTTED && peek().kind != Token::Kind::NAME) fail("the name of a section");
  next();
  expect('{', "at the beginning of a section");
  for (uint64_t depth = 1; depth > 0; next()) {
    if (peek().kind == Token::Kind::END) fail("'}' at the end of a section");
    depth += is_mark('{');
    depth -= is_mark('}');
  }
}

void Parser::top_level() {
  const Token& token = peek();
  if (accept(';')) return;
  if (token.kind != Token::Kind::DOTTED) fail("a directive, a variable or a function");
  if (accept("file")) return file();
  if (accept("section")) return section();
  if (accept("loc")) return location();
  if (is_dotted("pragma")) return skip_to_semicolon();
  bool is_extern = false;
  while (is_dotted("extern") || is_dotted("visible") || is_dotted("weak") || is_dotted("common")) {
    is_extern |= next().text == "extern";
  }
  if (accept("entry")) return function(true, is_extern);
  if (accept("func")) return function(false, is_extern);
  const Token& kind = peek();
  Space space;
  if (kind.kind != Token::Kind::DOTTED || !space_named(kind.text, space) || space == Space::PARAM ||
      space == Space::LOCAL) {
    fail("'.entry', '.func', '.global', '.const' or '.shared'");
  }
  next();
  variables(space, is_extern, module_.variables);
}

void Parser::threads(uint32_t (&extents)[3]) {
  std::fill_n(extents, 3, 1u);
  int i = 0;
  do {
    if (i == 3) fail("at most three extents");
    extents[i++] = expect_small("an extent", 0xffffffff);
  } while (accept(','));
}

void Parser::function_directives(Function& function) {
  uint32_t ignored[3];
  while (peek().kind == Token::Kind::DOTTED) {
    if (accept("maxntid")) {
      threads(function.max_threads);
    } else if (accept("reqntid")) {
      threads(function.required_threads);
    } else if (accept("maxnreg")) {
      function.max_registers = expect_small("a number of registers", 0xffffffff);
    } else if (accept("minnctapersm")) {
      function.min_blocks = expect_small("a number of blocks", 0xffffffff);
    } else if (accept("maxnctapersm") || accept("maxclusterrank") || accept("abi_preserve") ||
               accept("abi_preserve_control")) {
      expect_integer("an integer");
    } else if (accept("reqnctapercluster")) {
      threads(ignored);
    } else if (is_dotted("pragma")) {
      skip_to_semicolon();
    } else if (!accept("noreturn") && !accept("explicitcluster") && !accept("blocksareclusters")) {
      fail("a directive of a function, its body or ';'");
    }
  }
}

void Parser::function(bool is_entry, bool is_extern) {
  Function result;
  result.is_entry = is_entry;
  if (accept("attribute")) {
    expect('(', "after .attribute");
    while (!accept(')')) {
      if (peek().kind == Token::Kind::END) fail("')' after .attribute");
      next();
    }
  }
  if (!is_entry && is_mark('(')) result.results = parameters();
  result.place = peek().place;
  result.name = expect_name("the name of a function");
  if (is_mark('(')) result.parameters = parameters();
  function_directives(result);
  if (accept(';')) {
    result.is_extern = true;
  } else if (is_mark('{')) {
    if (is_extern) fail("';' after an .extern function");
    if (!defined_.insert(result.name).second) {
      throw SyntaxError(result.place, "function " + quote(result.name) + " is there twice");
    }
    body(result);
  } else {
    fail("'{' or ';' after the head of " + quote(result.name));
  }
  module_.functions.push_back(std::move(result));
}

std::vector<Variable> Parser::parameters() {
  std::vector<Variable> list;
  expect('(', "before parameters");
  if (accept(')')) return list;
  do {
    list.push_back(parameter());
  } while (accept(','));
  expect(')', "after parameters");
  return list;
}

// .param [.align 8] .b8 name[24] | .param .u64 .ptr .global .align 16 name | .reg .b32 name
Variable Parser::parameter() {
  Variable result;
  if (accept("param")) {
    result.space = Space::PARAM;
  } else if (accept("reg")) {
    result.space = Space::REGISTER;
  } else {
    fail("'.param' or '.reg'");
  }
  while (type_and_qualifiers(result)) {
  }
  if (result.type == Type::NONE) fail("the type of a parameter");
  result.place = peek().place;
  result.name = expect_name("the name of a parameter");
  dimensions(result);
  return result;
}

// One of .align N, .v2, .v4, .ptr, a space after .ptr, .attribute(...), a type. False: none is here.
bool Parser::type_and_qualifiers(Variable& variable) {
  const Token& token = peek();
  if (token.kind != Token::Kind::DOTTED) return false;
  Space space;
  if (accept("align")) {
    const Token& at = peek();
    const uint32_t align = expect_small("an alignment", 1 << 12);
    if (align == 0 || (align & (align - 1)) != 0)
      fail_at(at, "an alignment is a power of two; got " + std::to_string(align));
    (variable.pointer ? variable.pointer_align : variable.align) = align;
  } else if (accept("v2") || accept("v4")) {
    variable.vector = token.text == "v2" ? 2 : 4;
  } else if (accept("ptr")) {
    variable.pointer = true;
  } else if (variable.pointer && space_named(token.text, space)) {
    next();
    variable.pointer_space = space;
  } else if (accept("attribute")) {
    expect('(', "after .attribute");
    while (!accept(')')) {
      if (peek().kind == Token::Kind::END) fail("')' after .attribute");
      next();
    }
  } else if (variable.type == Type::NONE && type_named(token.text) != Type::NONE) {
    next();
    variable.type = type_named(token.text);
  } else {
    fail(variable.type == Type::NONE ? "a type" : "a name");
  }
  return true;
}

// name[4][8], name[]
void Parser::dimensions(Variable& variable) {
  const Token& token = peek();
  extents_.clear();
  uint64_t product = 1;  // without the extent that is left out
  while (accept('[')) {
    if (extents_.size() == MAX_EXTENTS) fail("an array of fewer dimensions");
    extents_.push_back(0);
    if (accept(']')) {
      if (extents_.size() > 1) fail_at(token, "only the first extent of " + quote(variable.name) + " may be left out");
      variable.elements = 0;
      continue;
    }
    const uint64_t extent = expect_integer("the extent of an array");
    expect(']', "after the extent of an array");
    if (extent > MAX_BYTES / product) fail_at(token, quote(variable.name) + " is too large");
    product *= std::max<uint64_t>(extent, 1);
    variable.elements *= extent;
    extents_.back() = extent;
  }
  const uint64_t each = static_cast<uint64_t>((bits_of(variable.type) + 7) / 8) * variable.vector;
  if (each != 0 && product > MAX_BYTES / each) fail_at(token, quote(variable.name) + " is too large");
}

// After the space: qualifiers, then `name<count>`, `name[extents] = initialiser`, ...;
void Parser::variables(Space space, bool is_extern, std::vector<Variable>& out) {
  Variable common;
  common.space = space;
  common.is_extern = is_extern;
  while (type_and_qualifiers(common)) {
  }
  if (common.type == Type::NONE) fail("the type of a variable");
  do {
    Variable variable = common;
    variable.place = peek().place;
    variable.name = expect_name("the name of a variable");
    if (space == Space::REGISTER && accept('<')) {
      const uint64_t count = unary(0).bits;
      expect('>', "after the number of registers");
      if (count == 0 || count > 10'000'000) {
        throw SyntaxError(variable.place, "a number of registers is 1 to 10,000,000");
      }
      variable.count = static_cast<uint32_t>(count);
    }
    dimensions(variable);
    if (accept('=')) {
      if (space != Space::GLOBAL && space != Space::CONST) fail("';': only .global and .const have initialisers");
      if (variable.vector > 1) extents_.push_back(variable.vector);
      initializer(variable, 0, 0, variable.elements * variable.vector);
    }
    if (&out == &module_.variables && !is_extern && !declared_.insert(variable.name).second) {
      throw SyntaxError(variable.place, "variable " + quote(variable.name) + " is there twice");
    }
    out.push_back(std::move(variable));
  } while (accept(','));
  expect(';', "after a declaration");
}

// The braces are those of the dimensions: `room` scalars from `first` on are to be filled. What is not named is zero,
// except in vectors, which are whole. Where the first extent is left out, the initialiser says it.
void Parser::initializer(Variable& variable, size_t depth, uint64_t first, uint64_t room) {
  if (depth == extents_.size()) {
    if (is_mark('{')) fail("one value: the braces of an initialiser are those of its array");
    return initial_value(variable, first);
  }
  const Token& begin = peek();
  expect('{', "before the elements of an initialiser");
  const bool sized_here = depth == 0 && variable.elements == 0;
  uint64_t part = 1;  // scalars of an element
  for (size_t i = depth + 1; i < extents_.size(); ++i) part *= extents_[i];
  uint64_t count = 0;
  if (!accept('}')) {
    do {
      if (!sized_here && count * part >= room) {
        fail_at(begin, "there is room for " + std::to_string(extents_[depth]) + " elements here; the initialiser of " +
                           quote(variable.name) + " has more");
      }
      initializer(variable, depth + 1, first + count * part, part);
      ++count;
    } while (accept(','));
    expect('}', "after an initialiser");
  }
  if (variable.vector > 1 && depth + 1 == extents_.size() && count != variable.vector) {
    fail_at(begin, "a vector has " + std::to_string(variable.vector) + " elements; got " + std::to_string(count));
  }
  if (!sized_here) return;
  const uint64_t bytes = static_cast<uint64_t>((bits_of(variable.type) + 7) / 8);
  if (part != 0 && count > MAX_BYTES / bytes / part) fail_at(begin, quote(variable.name) + " is too large");
  variable.elements = count * part / variable.vector;
}

// 5, -1, 0f3F800000, symbol, symbol+4, generic(symbol)+4, 0xFF00(symbol)
void Parser::initial_value(Variable& variable, uint64_t index) {
  Initializer value;
  value.index = index;
  const bool masked = peek().kind == Token::Kind::INTEGER && is_mark('(', 1);
  if (masked) {
    const Token& mask = next();
    next();
    for (uint8_t byte = 0; byte < 8; ++byte) {
      if (mask.bits == uint64_t{0xff} << (8 * byte)) value.mask_byte = static_cast<uint8_t>(byte + 1);
    }
    if (value.mask_byte == 0) fail_at(mask, "a mask selects one byte: 0xFF, 0xFF00, ...; got " + quote(mask.text));
  }
  if (peek().kind == Token::Kind::NAME && peek().text != "WARP_SZ") {
    value.symbol = next().text;
    if (value.symbol == "generic" && accept('(')) {
      value.generic = true;
      value.symbol = expect_name("the name of a variable");
      expect(')', "after generic(");
    }
    if (is_mark('+') || is_mark('-')) value.bits = expression_after_name();
  } else {
    const Operand constant = operand(false, 0);
    if (constant.kind != Operand::Kind::INTEGER && constant.kind != Operand::Kind::REAL) {
      throw SyntaxError(constant.place, "expected a constant in an initialiser");
    }
    const bool is_float = variable.type == Type::F32 || variable.type == Type::F64;
    if (is_float && constant.kind == Operand::Kind::INTEGER) {
      throw SyntaxError(constant.place, "an integer cannot initialise a ." + std::string(name_of(variable.type)));
    }
    value.bits = constant.bits;
    value.real_bits = constant.real_bits;
  }
  if (masked) expect(')', "after a masked address");
  variable.initializer.push_back(value);
}

}  // namespace sparse24::ptx
