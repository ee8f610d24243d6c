// PTX text to tokens.
#include "csrc/ptx/lexer.h"

#include <bit>
#include <charconv>
#include <cstdlib>
#include <string>

namespace sparse24::ptx {
namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }
bool starts_name(char c) { return is_letter(c) || c == '_' || c == '$' || c == '%'; }
bool continues_name(char c) { return is_letter(c) || is_digit(c) || c == '_' || c == '$'; }
bool is_hex(char c) { return is_digit(c) || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F'); }

class Lexer {
 public:
  explicit Lexer(std::string_view text) : text_(text) {}

  std::vector<Token> run() {
    std::vector<Token> tokens;
    tokens.reserve(text_.size() / 4 + 1);
    while (true) {
      const size_t before = at_;
      skip();
      Token token;
      token.place = place(at_);
      token.adjacent = at_ == before;
      if (at_ == text_.size()) {
        tokens.push_back(token);
        return tokens;
      }
      read(token);
      tokens.push_back(token);
    }
  }

 private:
  char peek(size_t ahead = 0) const { return at_ + ahead < text_.size() ? text_[at_ + ahead] : '\0'; }
  Place place(size_t at) const { return {line_, static_cast<uint32_t>(at - line_start_ + 1)}; }
  [[noreturn]] void fail(size_t at, const std::string& message) const { throw SyntaxError(place(at), message); }

  // Blanks and comments.
  void skip() {
    while (at_ < text_.size()) {
      const char c = text_[at_];
      if (c == '\n') {
        ++line_;
        line_start_ = ++at_;
      } else if (c == ' ' || c == '\t' || c == '\r' || c == '\f' || c == '\v') {
        ++at_;
      } else if (c == '/' && peek(1) == '/') {
        at_ = std::min(text_.find('\n', at_), text_.size());
      } else if (c == '/' && peek(1) == '*') {
        const size_t end = text_.find("*/", at_ + 2);
        if (end == std::string_view::npos) fail(at_, "a comment does not end");
        for (; at_ < end + 2; ++at_) {
          if (text_[at_] == '\n') ++line_, line_start_ = at_ + 1;
        }
      } else {
        return;
      }
    }
  }

  void read(Token& token) {
    const size_t start = at_;
    const char c = peek();
    if (starts_name(c) && (c != '%' || continues_name(peek(1)))) {  // else the operator
      token.kind = Token::Kind::NAME;
      for (++at_; continues_name(peek());) ++at_;
      token.text = text_.substr(start, at_ - start);
    } else if (c == '.' && (starts_name(peek(1)) || is_digit(peek(1)))) {
      token.kind = Token::Kind::DOTTED;
      for (++at_; continues_name(peek()) || (peek() == ':' && peek(1) == ':' && continues_name(peek(2)));) {
        at_ += peek() == ':' ? 2 : 1;
      }
      token.text = text_.substr(start + 1, at_ - start - 1);
    } else if (is_digit(c)) {
      number(token);
      token.text = text_.substr(start, at_ - start);
    } else if (c == '"') {
      token.kind = Token::Kind::STRING;
      for (++at_; peek() != '"'; ++at_) {
        if (at_ >= text_.size() || peek() == '\n') fail(start, "a string does not end");
        if (peek() == '\\' && at_ + 1 < text_.size() && peek(1) != '\n') ++at_;
      }
      token.text = text_.substr(start + 1, at_ - start - 1);
      ++at_;
    } else {
      token.kind = Token::Kind::MARK;
      token.mark = c;
      static constexpr struct {
        char first, second, mark;
      } PAIRS[] = {{'<', '<', 'l'}, {'>', '>', 'r'}, {'<', '=', 'L'}, {'>', '=', 'G'},
                   {'=', '=', 'E'}, {'!', '=', 'N'}, {'&', '&', 'A'}, {'|', '|', 'O'}};
      ++at_;
      for (const auto& pair : PAIRS) {
        if (c == pair.first && peek() == pair.second) {
          token.mark = pair.mark;
          ++at_;
          break;
        }
      }
      if (std::string_view("{}()[]<>,;:=+-*/%&|^~!?@_").find(c) == std::string_view::npos) {
        fail(start, "unexpected character " + quote(text_.substr(start, 1)));
      }
      token.text = text_.substr(start, at_ - start);
    }
  }

  void number(Token& token) {
    const size_t start = at_;
    const char kind = peek() == '0' ? peek(1) : '\0';
    const bool single = kind == 'f' || kind == 'F', twice = kind == 'd' || kind == 'D';
    if (single || twice) {
      at_ += 2;
      const size_t digits = at_;
      while (is_hex(peek())) ++at_;
      if (at_ - digits != (single ? 8u : 16u)) {
        fail(start, std::string("a floating-point constant 0") + kind + " has " + (single ? "8" : "16") +
                        " hexadecimal digits");
      }
      token.kind = Token::Kind::REAL;
      token.real_bits = single ? 32 : 64;
      std::from_chars(text_.data() + digits, text_.data() + at_, token.bits, 16);
      end_of_number(start);
      return;
    }
    int base = 10;
    size_t digits = at_;
    if (kind == 'x' || kind == 'X') {
      base = 16;
      digits = at_ += 2;
      while (is_hex(peek())) ++at_;
    } else if (kind == 'b' || kind == 'B') {
      base = 2;
      digits = at_ += 2;
      while (is_digit(peek())) ++at_;
    } else {
      while (is_digit(peek())) ++at_;
      const bool fraction = peek() == '.' && is_digit(peek(1));
      const bool exponent = (peek() == 'e' || peek() == 'E') &&
                            (is_digit(peek(1)) || ((peek(1) == '-' || peek(1) == '+') && is_digit(peek(2))));
      if (fraction || exponent) {
        if (fraction) {
          for (++at_; is_digit(peek());) ++at_;
        }
        if ((peek() == 'e' || peek() == 'E') &&
            (is_digit(peek(1)) || ((peek(1) == '-' || peek(1) == '+') && is_digit(peek(2))))) {
          for (at_ += 2; is_digit(peek());) ++at_;
        }
        double value = 0;
        if (std::from_chars(text_.data() + start, text_.data() + at_, value).ec != std::errc()) {
          fail(start, quote(text_.substr(start, at_ - start)) + " is not a floating-point number of 64 bits");
        }
        token.kind = Token::Kind::REAL;
        token.real_bits = 64;
        token.bits = std::bit_cast<uint64_t>(value);
        end_of_number(start);
        return;
      }
      if (at_ - start > 1 && text_[start] == '0') base = 8;
    }
    const auto [end, error] = std::from_chars(text_.data() + digits, text_.data() + at_, token.bits, base);
    if (error != std::errc() || end != text_.data() + at_ || digits == at_) {
      fail(start, quote(text_.substr(start, at_ - start)) + " is not an integer of 64 bits");
    }
    token.kind = Token::Kind::INTEGER;
    if (peek() == 'U') ++at_;
    end_of_number(start);
  }

  void end_of_number(size_t start) const {
    if (continues_name(peek())) fail(start, quote(text_.substr(start, at_ - start + 1)) + " is not a number");
  }

  std::string_view text_;
  size_t at_ = 0, line_start_ = 0;
  uint32_t line_ = 1;
};

}  // namespace

SyntaxError::SyntaxError(Place where, const std::string& message)
    : std::runtime_error("line " + std::to_string(where.line) + ", column " + std::to_string(where.column) + ": " +
                         message),
      place(where) {}

std::string quote(std::string_view text) {
  constexpr size_t LONGEST = 60;
  std::string quoted = "'";
  for (const char c : text.substr(0, LONGEST)) {
    if (c >= ' ' && c <= '~') {
      quoted += c;
    } else if (c == '\n' || c == '\t' || c == '\r') {
      quoted += ' ';
    } else {
      char hex[8];
      snprintf(hex, sizeof hex, "\\x%02x", static_cast<unsigned char>(c));
      quoted += hex;
    }
  }
  return quoted + (text.size() > LONGEST ? "...'" : "'");
}

std::vector<Token> tokenize(std::string_view text) { return Lexer(text).run(); }

}  // namespace sparse24::ptx
