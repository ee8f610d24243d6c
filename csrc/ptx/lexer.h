// PTX text to tokens. Source: PTX ISA, "Syntax".
#pragma once
#include <string_view>
#include <vector>

#include "csrc/ptx/syntax.h"

namespace sparse24::ptx {

struct Token {
  enum class Kind : uint8_t {
    NAME,     // identifiers; % and $ included
    DOTTED,   // ".global", ".L2::128B": a directive or a modifier; `text` is without the dot
    INTEGER,  // `bits`
    REAL,     // `bits`, `real_bits`
    STRING,   // `text` is without the quotes
    MARK,     // punctuation: `mark`
    END,
  };
  Kind kind = Kind::END;
  char mark = 0;  // << and >> are 'l' and 'r'; <= >= == != && || are 'L' 'G' 'E' 'N' 'A' 'O'
  uint8_t real_bits = 0;
  bool adjacent = false;  // nothing between it and the token before
  Place place;
  std::string_view text;
  uint64_t bits = 0;
};

// Ends with a token of kind END. Throws SyntaxError.
std::vector<Token> tokenize(std::string_view text);

// `text` as a message quotes it: short and printable.
std::string quote(std::string_view text);

}  // namespace sparse24::ptx
