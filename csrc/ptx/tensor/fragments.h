// Which element of which matrix each register of each lane holds, and what the metadata of mma.sp says.
//
// Source: PTX ISA, "Matrix Fragments for mma..." and "Sparse matrix storage". A lane is 4 g + t (its group and its
// place in it). All shapes but the f16 m8n8k4 follow one rule, in which `per` is how many elements a register holds:
// 32 / bits, and 1 for f64. The A of mma.sp is laid out as the dense A of its stored elements, half as wide.
//
// Seen as memory, a register of A or B of a whole warp is thereby a matrix of 8 rows of 4 `per` elements, row-major: 8
// rows of A, or 8 columns of B. The arithmetic reads the registers of a warp that way.
#pragma once
#include <cstdint>

namespace sparse24::ptx::tensor {

struct Cell {
  int row, column;
  friend constexpr bool operator==(Cell, Cell) = default;
};

// `rows` of the shape: 8 (m8) or 16 (m16).
constexpr Cell cell_of_a(int rows, int per, int lane, int reg, int element) {
  const int g = lane >> 2, t = lane & 3;
  if (rows == 8) return {g, per * t + element + 4 * per * reg};
  return {g + 8 * (reg & 1), per * t + element + 4 * per * (reg >> 1)};
}
// The row is k, the column n.
constexpr Cell cell_of_b(int per, int lane, int reg, int element) {
  return {per * (lane & 3) + element + 4 * per * reg, lane >> 2};
}
// C and D in f32, s32, f64: one element a register.
constexpr Cell cell_of_c(int lane, int reg) { return {(lane >> 2) + 8 * (reg >> 1), 2 * (lane & 3) + (reg & 1)}; }
// C and D in f16: two elements a register.
constexpr Cell cell_of_half_c(int lane, int reg, int element) {
  return {(lane >> 2) + 8 * reg, 2 * (lane & 3) + element};
}

// f16 m8n8k4 multiplies four times 8x4 by 4x8: product q is that of lanes 4q to 4q+3 and 16+4q to 16+4q+3. `element`
// counts through a lane's registers.
namespace quads {
constexpr int product_of(int lane) { return (lane & 15) >> 2; }
constexpr Cell cell_of_a(bool by_columns, int lane, int element) {
  const int high = lane < 16 ? 0 : 4;
  return by_columns ? Cell{element + high, lane & 3} : Cell{(lane & 3) + high, element};
}
constexpr Cell cell_of_b(bool by_columns, int lane, int element) {
  const int high = lane < 16 ? 0 : 4;
  return by_columns ? Cell{element, (lane & 3) + high} : Cell{lane & 3, element + high};
}
constexpr Cell cell_of_half_c(int lane, int element) { return {(lane & 3) + (lane < 16 ? 0 : 4), element}; }
constexpr Cell cell_of_c(int lane, int element) {
  return {(lane & 1) + (element & 2) + (lane < 16 ? 0 : 4), (element & 4) + (lane & 2) + (element & 1)};
}
}  // namespace quads

// ---- Metadata of mma.sp
// ----------------------------------------------------------------------------------------------
//
// A row of A is cut into chunks that keep half of their elements. Four bits say which:
//   f16, bf16, 8-bit types  2 of 4 elements: two 2-bit places
//   4-bit types             2 of 4 pairs of elements: two 2-bit places
//   tf32                    1 of 2 elements: 0b0100 the first, 0b1110 the second
// The chunks of a row follow each other from the low bits up. Where its bits are:
//   16- and 32-bit types  words_of lanes of each group of four hold the rows g (bits 0-15) and g + 8 (bits 16-31); each
//                         further lane goes on with the columns
//   8- and 4-bit types    lane 2 sel + b holds all 32 bits of row g + 8 b; with four lanes, lane t holds those of row
//                         g + 8 (t & 1), of the first or (t >> 1) second half of the columns
// The full-K shapes were seen to be so by running CUTLASS's kernels; for the half-K shapes of 8- and 4-bit types the
// ISA has only a figure, and the layout here is what the full-K one implies.
struct Sparsity {
  int bits;   // of an element of A
  int depth;  // elements of A that a row stores, half of K

  constexpr int chunks() const { return bits == 32 ? depth : bits == 4 ? depth / 4 : depth / 2; }
  // Lanes of a group that contribute a word: 1, 2 or 4.
  constexpr int words() const { return chunks() * 4 * 16 / (8 * 32); }
  // Selectors 0 to this - 1 are defined.
  constexpr int selectors() const { return 4 / words(); }
  // The lane of group `g` that holds chunk `chunk` of row g + 8 * high, and the bit it starts at.
  struct Bits {
    int lane, shift;
  };
  constexpr Bits bits_of(int g, int high, int chunk, int selector) const {
    const int first = 4 * g + words() * selector;
    if (bits >= 16) return {first + chunk / 4, 16 * high + 4 * (chunk % 4)};
    return {first + high + 2 * (chunk / 8), 4 * (chunk % 8)};
  }
};

// The metadata of each row, its first chunk in the low bits; `words` is the operand's 32 lanes.
void rows_of_metadata(const Sparsity& sparsity, int selector, const uint32_t* words, uint64_t (&rows)[16]);

// For each stored element of a row, `scale` times the row of B that it multiplies: rows[m][element] lands at
// source[m * depth + element]. Undefined codes choose some row within the chunk.
void expand_metadata(const Sparsity& sparsity, const uint64_t (&rows)[16], uint16_t* source);
constexpr int SOURCE_SCALE = 8;  // the rows of B are 8 wide

// The first chunk whose code is undefined. Ordered: the two places must increase. Otherwise they must differ.
struct Defect {
  int lane, row, chunk;
  uint32_t code;
};
bool find_defect(const Sparsity& sparsity, int selector, bool ordered, const uint32_t* words, Defect* defect);

}  // namespace sparse24::ptx::tensor
