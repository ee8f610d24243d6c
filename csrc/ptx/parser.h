// The parser's state: a list of tokens and the tree under construction. Two parts: parser.cpp reads statements and
// operands, parser_declarations.cpp what stands outside of functions, and variables.
#pragma once
#include <algorithm>
#include <set>

#include "csrc/ptx/lexer.h"

namespace sparse24::ptx {

class Parser {
 public:
  Parser(Module& module, std::vector<Token> tokens) : module_(module), tokens_(std::move(tokens)) {}
  void run();

 private:
  // ---- tokens ----
  const Token& peek(size_t ahead = 0) const { return tokens_[std::min(at_ + ahead, tokens_.size() - 1)]; }
  const Token& next() {
    const Token& token = peek();
    if (at_ + 1 < tokens_.size()) ++at_;
    return token;
  }
  bool is_mark(char mark, size_t ahead = 0) const {
    return peek(ahead).kind == Token::Kind::MARK && peek(ahead).mark == mark;
  }
  bool is_dotted(std::string_view text) const { return peek().kind == Token::Kind::DOTTED && peek().text == text; }
  bool accept(char mark) { return is_mark(mark) && (next(), true); }
  bool accept(std::string_view dotted) { return is_dotted(dotted) && (next(), true); }
  void expect(char mark, const char* where);
  std::string_view expect_name(const char* what);
  uint64_t expect_integer(const char* what);  // a constant expression
  uint32_t expect_small(const char* what, uint64_t limit);
  [[noreturn]] void fail(const std::string& expected) const;
  [[noreturn]] static void fail_at(const Token& token, const std::string& message);

  // ---- parser.cpp ----
  void body(Function& function);
  void statement(Function& function, uint32_t depth);
  void instruction(Function& function);
  void location();
  Operand operand(bool list_allowed, int depth);
  Operand address(int depth);
  std::vector<Operand> parts(char end, int depth);
  // PTX ISA, "Integer Constant Expression Evaluation"
  struct Constant {
    uint64_t bits = 0;
    bool is_unsigned = false;
  };
  Constant expression(int precedence, int depth);
  Constant unary(int depth);
  Constant combined(const Token& sign, Constant left, Constant right) const;
  uint64_t expression_after_name();
  std::string_view qualified_name();  // "%tid.x"

  // ---- parser_declarations.cpp ----
  void header();
  void top_level();
  void file();
  void section();
  void skip_to_semicolon();
  void function(bool is_entry, bool is_extern);
  void function_directives(Function& function);
  void threads(uint32_t (&extents)[3]);
  std::vector<Variable> parameters();
  Variable parameter();
  void variables(Space space, bool is_extern, std::vector<Variable>& out);
  bool type_and_qualifiers(Variable& variable);
  void dimensions(Variable& variable);
  void initializer(Variable& variable, size_t depth, uint64_t first, uint64_t room);
  void initial_value(Variable& variable, uint64_t index);
  static bool space_named(std::string_view name, Space& space);

  Module& module_;
  std::vector<Token> tokens_;
  size_t at_ = 0;
  SourceLine source_;
  std::set<std::pair<uint32_t, std::string_view>> labels_;  // by scope
  std::vector<uint32_t> open_scopes_;
  uint32_t scope_count_ = 0;
  std::set<std::string_view> defined_;   // functions with a body
  std::set<std::string_view> declared_;  // variables of the module
  std::vector<uint64_t> extents_;        // of the variable being read; vectors are its last dimension
};

}  // namespace sparse24::ptx
