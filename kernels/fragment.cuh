// Where each lane's registers of a full-K mma.sp lie in its matrices: m16n8k32 of 16-bit and m16n8k64 of 8-bit
// elements. A step of K is STEP_BYTES of a row of x, half as many of a row of the compressed A: in bytes both types are
// the same.
//
// Source: PTX ISA, "Matrix Fragments for sparse mma.m16n8k32 / m16n8k64". The emulator has tables of its own.
#pragma once
#include "format.cuh"

namespace sparse24::fragment {

constexpr int LANES = 32;
constexpr int ROWS = 16;          // of A and D
constexpr int TOKENS = 8;         // columns of B and D
constexpr int REGISTERS = 4;      // of A, B and D
constexpr int STEP_BYTES = 64;    // of one token of B
constexpr int VALUES_BYTES = 32;  // of one row of A, compressed

struct Place {
  int row;
  int column;
};

// Byte `byte` of register `i` of A: row, and byte of the compressed row.
SPARSE24_INLINE constexpr Place a(int lane, int i, int byte) {
  return {lane / 4 + 8 * (i & 1), 16 * (i >> 1) + 4 * (lane % 4) + byte};
}
// Byte `byte` of register `i` of B: token, and byte of its K.
SPARSE24_INLINE constexpr Place b(int lane, int i, int byte) { return {lane / 4, 16 * i + 4 * (lane % 4) + byte}; }

// Register `i` of D: row, and token.
SPARSE24_INLINE constexpr Place d(int lane, int i) { return {lane / 4 + 8 * (i >> 1), 2 * (lane % 4) + (i & 1)}; }

// Index `index` of the sixteen 2-bit indices of a lane's metadata word: row, and element of the compressed row.
// 16 bits: each half of the word is a row's; the two lanes of a quad that `selector` names hold 16 elements.
SPARSE24_INLINE constexpr Place metadata_16(int lane, int selector, int index) {
  return {lane / 4 + 8 * (index / 8), 8 * (lane % 4 - 2 * selector) + index % 8};
}
// 8 bits: all four lanes of a quad, a row each for half of its 32 elements.
SPARSE24_INLINE constexpr Place metadata_8(int lane, int index) {
  return {lane / 4 + 8 * (lane % 2), 16 * (lane % 4 / 2) + index};
}

// ---- Each place is met exactly once ----

namespace detail {
// Whether place(0..count-1) fills a matrix of rows x columns.
template <class At>
constexpr bool fills(int rows, int columns, int count, At place) {
  bool met[1024] = {};
  for (int i = 0; i < count; ++i) {
    const Place at = place(i);
    if (at.row < 0 || at.row >= rows || at.column < 0 || at.column >= columns || met[at.row * columns + at.column])
      return false;
    met[at.row * columns + at.column] = true;
  }
  return count == rows * columns;
}
constexpr Place each_a(int i) { return a(i / 16, i / 4 % 4, i % 4); }
constexpr Place each_b(int i) { return b(i / 16, i / 4 % 4, i % 4); }
constexpr Place each_d(int i) { return d(i / 4, i % 4); }
constexpr Place each_8(int i) { return metadata_8(i / 16, i % 16); }
template <int SELECTOR>
constexpr Place each_16(int i) {
  return metadata_16(i / 32 * 4 + 2 * SELECTOR + i / 16 % 2, SELECTOR, i % 16);
}
}  // namespace detail

static_assert(detail::fills(ROWS, VALUES_BYTES, LANES * REGISTERS * 4, detail::each_a));
static_assert(detail::fills(TOKENS, STEP_BYTES, LANES * REGISTERS * 4, detail::each_b));
static_assert(detail::fills(ROWS, TOKENS, LANES* REGISTERS, detail::each_d));
static_assert(detail::fills(ROWS, VALUES_BYTES, LANES * 16, detail::each_8));
static_assert(detail::fills(ROWS, VALUES_BYTES / 2, LANES / 2 * 16, detail::each_16<0>));
static_assert(detail::fills(ROWS, VALUES_BYTES / 2, LANES / 2 * 16, detail::each_16<1>));

}  // namespace sparse24::fragment
