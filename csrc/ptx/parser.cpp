// Statements, instructions and operands. Source: PTX ISA, "Syntax", "Instruction Operands".
#include "csrc/ptx/parser.h"

#include <algorithm>

namespace sparse24::ptx {
namespace {

constexpr int MAX_DEPTH = 64;          // of nested operands and expressions
constexpr uint32_t MAX_SCOPES = 1024;  // of nested { }

// How tightly a binary operator of constant expressions binds; 0 for what is none.
int precedence_of(const Token& token) {
  if (token.kind != Token::Kind::MARK) return 0;
  switch (token.mark) {
    case 'O':
      return 1;
    case 'A':
      return 2;
    case '|':
      return 3;
    case '^':
      return 4;
    case '&':
      return 5;
    case 'E':
    case 'N':
      return 6;
    case '<':
    case '>':
    case 'L':
    case 'G':
      return 7;
    case 'l':
    case 'r':
      return 8;
    case '+':
    case '-':
      return 9;
    case '*':
    case '/':
    case '%':
      return 10;
    default:
      return 0;
  }
}

}  // namespace

void Parser::fail(const std::string& expected) const {
  const Token& token = peek();
  fail_at(token, "expected " + expected +
                     (token.kind == Token::Kind::END ? "; the text ends here"
                                                     : "; got " + quote((token.kind == Token::Kind::DOTTED ? "." : "") +
                                                                        std::string(token.text))));
}

void Parser::fail_at(const Token& token, const std::string& message) { throw SyntaxError(token.place, message); }

void Parser::expect(char mark, const char* where) {
  if (!accept(mark)) fail(std::string("'") + mark + "' " + where);
}

std::string_view Parser::expect_name(const char* what) {
  if (peek().kind != Token::Kind::NAME) fail(what);
  return next().text;
}

uint64_t Parser::expect_integer(const char* what) {
  const bool begins = peek().kind == Token::Kind::INTEGER || is_mark('-') || is_mark('+') || is_mark('~') ||
                      is_mark('!') || is_mark('(') || (peek().kind == Token::Kind::NAME && peek().text == "WARP_SZ");
  if (!begins) fail(what);
  return expression(1, 0).bits;
}

uint32_t Parser::expect_small(const char* what, uint64_t limit) {
  const Token& token = peek();
  const uint64_t value = expect_integer(what);
  if (value > limit)
    fail_at(token, std::string(what) + " is at most " + std::to_string(limit) + "; got " + std::to_string(value));
  return static_cast<uint32_t>(value);
}

// ---- constant expressions: integers of 64 bits ---------------------------------------------------------------------

Parser::Constant Parser::unary(int depth) {
  if (depth > MAX_DEPTH) fail("an expression that nests less deep");
  if (accept('-')) {
    const Constant value = unary(depth + 1);
    return {uint64_t{0} - value.bits, value.is_unsigned};
  }
  if (accept('+')) return unary(depth + 1);
  if (accept('~')) return {~unary(depth + 1).bits, true};
  if (accept('!')) return {unary(depth + 1).bits == 0};
  if (accept('(')) {
    if (peek().kind == Token::Kind::DOTTED) {  // a cast
      if (!is_dotted("s64") && !is_dotted("u64")) fail(".s64 or .u64");
      const bool is_unsigned = next().text == "u64";
      expect(')', "after the type of a cast");
      return {unary(depth + 1).bits, is_unsigned};
    }
    const Constant value = expression(1, depth + 1);
    expect(')', "after a constant expression");
    return value;
  }
  if (peek().kind == Token::Kind::NAME && peek().text == "WARP_SZ") return next(), Constant{32};
  if (peek().kind != Token::Kind::INTEGER) fail("an integer constant");
  const Token& literal = next();
  return {literal.bits, literal.text.ends_with('U') || literal.bits >> 63 != 0};
}

// The usual arithmetic conversions: unsigned where either operand is. Shifts by 64 and more leave no bit, as shl's do.
Parser::Constant Parser::combined(const Token& sign, Constant left, Constant right) const {
  const uint64_t a = left.bits, b = right.bits;
  const bool is_unsigned = left.is_unsigned || right.is_unsigned;
  const bool less = is_unsigned ? a < b : static_cast<int64_t>(a) < static_cast<int64_t>(b);
  switch (sign.mark) {
    case 'O':
      return {a != 0 || b != 0};
    case 'A':
      return {a != 0 && b != 0};
    case '|':
      return {a | b, is_unsigned};
    case '^':
      return {a ^ b, is_unsigned};
    case '&':
      return {a & b, is_unsigned};
    case 'E':
      return {a == b};
    case 'N':
      return {a != b};
    case '<':
      return {less};
    case '>':
      return {!less && a != b};
    case 'L':
      return {less || a == b};
    case 'G':
      return {!less};
    case 'l':
      return {b > 63 ? 0 : a << b, left.is_unsigned};
    case 'r':
      if (left.is_unsigned) return {b > 63 ? 0 : a >> b, true};
      return {static_cast<uint64_t>(static_cast<int64_t>(a) >> std::min<uint64_t>(b, 63))};
    case '+':
      return {a + b, is_unsigned};
    case '-':
      return {a - b, is_unsigned};
    case '*':
      return {a * b, is_unsigned};
    default:
      break;
  }
  if (b == 0) fail_at(sign, "division by zero in a constant expression");
  if (sign.mark == '%') return {a % b};  // unsigned, whatever the operands
  if (is_unsigned) return {a / b, true};
  if (b == ~uint64_t{0}) return {uint64_t{0} - a};  // the host's division traps on the smallest integer
  return {static_cast<uint64_t>(static_cast<int64_t>(a) / static_cast<int64_t>(b))};
}

Parser::Constant Parser::expression(int lowest, int depth) {
  Constant left = unary(depth);
  while (true) {
    const Token& token = peek();
    const int precedence = precedence_of(token);
    if (precedence < lowest || precedence == 0) break;
    next();
    left = combined(token, left, expression(precedence + 1, depth + 1));
  }
  if (lowest == 1 && is_mark('?')) {
    if (depth > MAX_DEPTH) fail("an expression that nests less deep");
    next();
    const Constant yes = expression(1, depth + 1);
    expect(':', "in a conditional expression");
    const Constant no = expression(1, depth + 1);
    return {left.bits != 0 ? yes.bits : no.bits, yes.is_unsigned || no.is_unsigned};
  }
  return left;
}

// ---- operands -------------------------------------------------------------------------------------------------------

// A name with the suffixes that follow it at once: %tid.x.
std::string_view Parser::qualified_name() {
  const Token& first = next();
  std::string_view name = first.text;
  if (name.starts_with('%') && peek().kind == Token::Kind::DOTTED && peek().adjacent) {
    const Token& suffix = next();
    name = {name.data(), static_cast<size_t>(suffix.text.data() + suffix.text.size() - name.data())};
  }
  return name;
}

std::vector<Operand> Parser::parts(char end, int depth) {
  std::vector<Operand> list;
  if (accept(end)) return list;
  do {
    list.push_back(operand(false, depth));
  } while (accept(','));
  if (!accept(end)) fail(std::string("',' or '") + end + "'");
  return list;
}

Operand Parser::address(int depth) {
  Operand result;
  result.kind = Operand::Kind::ADDRESS;
  result.place = peek().place;
  next();  // [
  if (peek().kind == Token::Kind::NAME && peek().text != "WARP_SZ") {
    result.name = qualified_name();
    if (is_mark('+') || is_mark('-')) result.offset = static_cast<int64_t>(expression_after_name());
  } else {
    result.bits = expect_integer("an address: a register, a variable or an integer");
  }
  while (accept(',')) result.parts.push_back(operand(false, depth + 1));
  expect(']', "after an address");
  return result;
}

// The constant that follows a name: `+ 4`, `- 4`, `+ -4`, `+ 4 * 2`.
uint64_t Parser::expression_after_name() {
  uint64_t sum = 0;
  while (is_mark('+') || is_mark('-')) {
    const bool minus = next().mark == '-';
    const uint64_t term = expression(10, 0).bits;
    sum = minus ? sum - term : sum + term;
  }
  return sum;
}

Operand Parser::operand(bool list_allowed, int depth) {
  if (depth > MAX_DEPTH) fail("an operand that nests less deep");
  Operand result;
  result.place = peek().place;
  const Token& token = peek();
  if (is_mark('{')) {
    next();
    result.kind = Operand::Kind::VECTOR;
    result.parts = parts('}', depth + 1);
    return result;
  }
  if (is_mark('[')) return address(depth);
  if (is_mark('(') && list_allowed) {
    next();
    result.kind = Operand::Kind::LIST;
    result.parts = parts(')', depth + 1);
    return result;
  }
  if (is_mark('!') && peek(1).kind == Token::Kind::NAME) {
    next();
    result.kind = Operand::Kind::NAME;
    result.negated = true;
    result.name = qualified_name();
    return result;
  }
  if ((is_mark('-') && peek(1).kind == Token::Kind::REAL) || token.kind == Token::Kind::REAL) {
    const bool minus = accept('-');
    const Token& real = next();
    result.kind = Operand::Kind::REAL;
    result.real_bits = real.real_bits;
    result.bits = minus ? real.bits ^ (uint64_t{1} << (real.real_bits - 1)) : real.bits;
    return result;
  }
  if (token.kind == Token::Kind::NAME && token.text != "WARP_SZ") {
    if (token.text == "_") {
      next();
      result.kind = Operand::Kind::SINK;
    } else {
      result.kind = Operand::Kind::NAME;
      result.name = qualified_name();
      if (is_mark('+') || is_mark('-')) result.offset = static_cast<int64_t>(expression_after_name());
    }
    if (is_mark('|')) {
      next();
      Operand pair;
      pair.kind = Operand::Kind::PAIR;
      pair.place = result.place;
      Operand second = operand(false, depth + 1);
      if (second.kind != Operand::Kind::NAME && second.kind != Operand::Kind::SINK) {
        throw SyntaxError(second.place, "expected a predicate after '|'");
      }
      pair.parts.push_back(std::move(result));
      pair.parts.push_back(std::move(second));
      return pair;
    }
    return result;
  }
  result.kind = Operand::Kind::INTEGER;
  result.bits = expect_integer("an operand");
  return result;
}

// ---- statements -----------------------------------------------------------------------------------------------------

// .loc file line column [, function_name label [+ offset]] [, inlined_at file line column]
void Parser::location() {
  source_.file = expect_small("the file of .loc", 0xffffffff);
  source_.line = expect_small("the line of .loc", 0xffffffff);
  expect_integer("the column of .loc");
  while (is_mark(',') && peek(1).kind == Token::Kind::NAME) {
    next();
    const std::string_view attribute = next().text;
    if (attribute == "function_name") {
      expect_name("a label after function_name");
      if (is_mark('+')) expression_after_name();
    } else if (attribute == "inlined_at") {
      for (int i = 0; i < 3; ++i) expect_integer("file, line and column after inlined_at");
    } else {
      fail("function_name or inlined_at");
    }
  }
}

void Parser::instruction(Function& function) {
  Instruction result;
  result.source = source_;
  result.place = peek().place;
  if (accept('@')) {
    result.predicate_negated = accept('!');
    result.predicate = expect_name("a predicate after '@'");
    result.place = peek().place;
  }
  const Token& first = peek();
  if (first.kind != Token::Kind::NAME) fail("an instruction");
  result.opcode = next().text;
  while (peek().kind == Token::Kind::DOTTED) result.modifiers.push_back(next().text);
  const bool is_call = result.opcode == "call";
  if (!is_mark(';')) {
    do {
      result.operands.push_back(operand(is_call, 0));
    } while (accept(','));
  }
  const Token& end = peek();
  if (!is_mark(';')) fail("',' or ';' after an operand of " + quote(result.opcode));
  next();
  result.text = {first.text.data(), static_cast<size_t>(end.text.data() - first.text.data())};
  function.body.push_back(std::move(result));
}

void Parser::statement(Function& function, uint32_t depth) {
  const Token& token = peek();
  if (token.kind == Token::Kind::DOTTED) {
    Space space;
    if (accept("loc")) {
      location();
    } else if (is_dotted("pragma")) {
      skip_to_semicolon();
    } else if (space_named(token.text, space) || token.text == "reg") {
      next();
      std::vector<Variable> declared;
      variables(token.text == "reg" ? Space::REGISTER : space, false, declared);
      for (Variable& variable : declared) function.body.push_back(std::move(variable));
    } else {
      fail("a statement");
    }
    return;
  }
  if (is_mark('{')) {
    if (depth >= MAX_SCOPES) fail("scopes that nest less deep");
    next();
    function.body.push_back(ScopeBegin{});
    open_scopes_.push_back(++scope_count_);
    return;
  }
  if (token.kind == Token::Kind::NAME && is_mark(':', 1)) {
    next();
    next();
    if (is_dotted("branchtargets") || is_dotted("calltargets")) {
      next();
      Targets targets{token.place, token.text, {}};
      do {
        targets.labels.push_back(expect_name("a label"));
      } while (accept(','));
      expect(';', "after a list of labels");
      function.body.push_back(std::move(targets));
      return;
    }
    if (is_dotted("callprototype")) {
      skip_to_semicolon();
      return;
    }
    if (!labels_.emplace(open_scopes_.back(), token.text).second) {
      fail_at(token, "label " + quote(token.text) + " is there twice");
    }
    function.body.push_back(Label{token.place, token.text});
    return;
  }
  instruction(function);
}

// { statements }
void Parser::body(Function& function) {
  next();
  labels_.clear();
  scope_count_ = 0;
  open_scopes_.assign(1, 0);
  source_ = {};
  while (true) {
    if (peek().kind == Token::Kind::END) fail("'}' at the end of " + quote(function.name));
    if (accept('}')) {
      open_scopes_.pop_back();
      if (open_scopes_.empty()) return;
      function.body.push_back(ScopeEnd{});
      continue;
    }
    if (accept(';')) continue;
    statement(function, static_cast<uint32_t>(open_scopes_.size()));
  }
}

void Parser::run() {
  header();
  while (peek().kind != Token::Kind::END) top_level();
}

std::unique_ptr<const Module> parse(std::string_view text) {
  auto module = std::make_unique<Module>();
  module->text = text;
  Parser(*module, tokenize(module->text)).run();
  return module;
}

}  // namespace sparse24::ptx
