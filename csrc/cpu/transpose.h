// Transposition: of images between contiguous and channels last, of weights between rows and columns.
#pragma once
#include <cstdint>

namespace sparse24::cpu {

// to[c][r] = from[r][c] for `rows` x `columns` elements of 1, 2 or 4 bytes; rows of `from` and of `to` lie so many
// elements apart.
using Transpose = void (*)(const void* from, int64_t from_stride, void* to, int64_t to_stride, int64_t rows,
                           int64_t columns, int element_bytes);
void portable_transpose(const void* from, int64_t from_stride, void* to, int64_t to_stride, int64_t rows,
                        int64_t columns, int element_bytes);
void avx512_transpose(const void* from, int64_t from_stride, void* to, int64_t to_stride, int64_t rows, int64_t columns,
                      int element_bytes);

Transpose transposition();  // of the active ISA

// to [columns][rows] of from [rows][columns], rows of `from` so many elements apart; in parallel.
void transpose(const void* from, int64_t from_stride, void* to, int64_t rows, int64_t columns, int element_bytes);

}  // namespace sparse24::cpu
