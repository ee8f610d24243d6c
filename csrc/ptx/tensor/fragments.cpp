// The metadata of mma.sp: from words to rows, to rows of B, and what is undefined in it.
#include "csrc/ptx/tensor/fragments.h"

#include <array>
#include <bit>
#include <cstring>
#include <type_traits>

namespace sparse24::ptx::tensor {
namespace {

// A register of a warp is, in memory, 8 rows of 4 `per` elements; two registers of C side by side, or one of pairs of
// f16, are 8 rows of 8.
constexpr bool registers_are_matrices() {
  for (const int per : {1, 2, 4, 8, 32}) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int element = 0; element < per; ++element) {
        const int place = lane * per + element, row = place / (4 * per), column = place % (4 * per);
        for (int reg = 0; reg < 4; ++reg) {
          const Cell a{row + 8 * (reg & 1), column + 4 * per * (reg >> 1)};
          if (cell_of_a(16, per, lane, reg, element) != a) return false;
          if (cell_of_b(per, lane, reg, element) != Cell{column + 4 * per * reg, row}) return false;
        }
      }
    }
  }
  for (int place = 0; place < 64; ++place) {
    for (int half = 0; half < 2; ++half) {
      const Cell c{place / 8 + 8 * half, place % 8};
      if (cell_of_c(place / 2, 2 * half + place % 2) != c) return false;
      if (cell_of_half_c(place / 2, half, place % 2) != c) return false;
    }
  }
  return true;
}
static_assert(registers_are_matrices());

// What a byte of metadata (two chunks) adds to the rows of B, packed: 16 bits for each of its 2, 4 or 8 stored
// elements.
template <int BITS>
struct Byte {
  static constexpr int CHUNK = BITS == 32 ? 2 : BITS == 4 ? 8 : 4, KEPT = CHUNK / 2, STORED = 2 * KEPT;
  using Word = std::conditional_t<BITS == 32, uint32_t, uint64_t>;
  static constexpr int PER_WORD = sizeof(Word) / 2, WORDS = STORED / PER_WORD;

  static constexpr int place(int byte, int element) {
    const int chunk = element / KEPT, i = element % KEPT, code = byte >> (4 * chunk) & 15;
    const int within = BITS == 32  ? code >> 3
                       : BITS == 4 ? 2 * (code >> (2 * (i / 2)) & 3) + i % 2
                                   : code >> (2 * i) & 3;
    return chunk * CHUNK + within;
  }
  static constexpr auto make_table() {
    std::array<std::array<Word, WORDS>, 256> table{};
    for (int byte = 0; byte < 256; ++byte) {
      for (int i = 0; i < STORED; ++i) {
        table[byte][i / PER_WORD] |= static_cast<Word>(SOURCE_SCALE * place(byte, i)) << (16 * (i % PER_WORD));
      }
    }
    return table;
  }
};

template <int BITS>
void expand(int depth, const uint64_t (&rows)[16], uint16_t* source) {
  using Entry = Byte<BITS>;
  using Word = typename Entry::Word;
  static_assert(std::endian::native == std::endian::little);
  static constexpr auto table = Entry::make_table();
  constexpr Word ONES = static_cast<Word>(0x0001000100010001u);
  for (int m = 0; m < 16; ++m, source += depth) {
    uint64_t row = rows[m];
    for (int first = 0; first < depth; first += Entry::STORED, row >>= 8) {
      const Word base = ONES * static_cast<Word>(2 * SOURCE_SCALE * first);  // no sum reaches 2^16
      for (int i = 0; i < Entry::WORDS; ++i) {
        const Word word = table[row & 255][i] + base;
        std::memcpy(source + first + i * Entry::PER_WORD, &word, sizeof word);
      }
    }
  }
}

bool undefined(const Sparsity& sparsity, bool ordered, uint32_t code) {
  if (sparsity.bits == 32) return code != 0b0100 && code != 0b1110;
  const uint32_t low = code & 3, high = code >> 2;
  return ordered ? high <= low : high == low;
}

// Whether any of a word's eight codes is undefined, all at once.
bool any_undefined(const Sparsity& sparsity, bool ordered, uint32_t word) {
  if (sparsity.bits == 32) {
    // 0b0100 and 0b1110 are the codes whose bits 3 and 1 are the same, whose bit 2 is set and whose bit 0 is not.
    return ((word ^ word << 2) & 0x88888888u) != 0 || (word & 0x55555555u) != 0x44444444u;
  }
  const uint32_t low = word & 0x33333333u, high = word >> 2 & 0x33333333u;
  if (ordered) return (((high | 0x44444444u) - low - 0x11111111u) & 0x44444444u) != 0x44444444u;
  const uint32_t same = low ^ high;  // a code is undefined where both of its bits are 0
  return ((same | same >> 1) & 0x11111111u) != 0x11111111u;
}

}  // namespace

void rows_of_metadata(const Sparsity& sparsity, int selector, const uint32_t* words, uint64_t (&rows)[16]) {
  const int count = sparsity.words();
  for (int g = 0; g < 8; ++g) {
    const uint32_t* e = words + 4 * g + count * selector;
    if (sparsity.bits >= 16) {
      uint64_t low = e[0] & 0xffff, high = e[0] >> 16;
      if (count == 2)
        low |= static_cast<uint64_t>(e[1] & 0xffff) << 16, high |= static_cast<uint64_t>(e[1] >> 16) << 16;
      rows[g] = low, rows[g + 8] = high;
    } else {
      rows[g] = e[0], rows[g + 8] = e[1];
      if (count == 4) rows[g] |= static_cast<uint64_t>(e[2]) << 32, rows[g + 8] |= static_cast<uint64_t>(e[3]) << 32;
    }
  }
}

void expand_metadata(const Sparsity& sparsity, const uint64_t (&rows)[16], uint16_t* source) {
  switch (sparsity.bits) {
    case 32:
      return expand<32>(sparsity.depth, rows, source);
    case 4:
      return expand<4>(sparsity.depth, rows, source);
    default:
      return expand<16>(sparsity.depth, rows, source);
  }
}

bool find_defect(const Sparsity& sparsity, int selector, bool ordered, const uint32_t* words, Defect* defect) {
  const int count = sparsity.words();
  bool any = false;
  for (int g = 0; g < 8; ++g) {
    for (int i = 0; i < count; ++i) any |= any_undefined(sparsity, ordered, words[4 * g + count * selector + i]);
  }
  if (!any) return false;
  for (int row = 0; row < 16; ++row) {
    for (int chunk = 0; chunk < sparsity.chunks(); ++chunk) {
      const Sparsity::Bits at = sparsity.bits_of(row % 8, row / 8, chunk, selector);
      const uint32_t code = words[at.lane] >> at.shift & 15;
      if (undefined(sparsity, ordered, code)) {
        *defect = {at.lane, row, chunk, code};
        return true;
      }
    }
  }
  return false;
}

}  // namespace sparse24::ptx::tensor
