// transpose.h in plain C++: square tiles, so that both sides stay in the L1.
#include "csrc/cpu/conv/transpose.h"

#include <algorithm>

namespace sparse24::cpu {
namespace {

template <class Value>
void transpose(const void* from, int64_t from_stride, void* to, int64_t to_stride, int64_t rows, int64_t columns) {
  constexpr int64_t TILE = 16;
  const auto source = static_cast<const Value*>(from);
  const auto target = static_cast<Value*>(to);
  for (int64_t r = 0; r < rows; r += TILE) {
    for (int64_t c = 0; c < columns; c += TILE) {
      for (int64_t i = r; i < std::min(r + TILE, rows); ++i) {
        for (int64_t j = c; j < std::min(c + TILE, columns); ++j)
          target[j * to_stride + i] = source[i * from_stride + j];
      }
    }
  }
}

}  // namespace

void portable_transpose(const void* from, int64_t from_stride, void* to, int64_t to_stride, int64_t rows,
                        int64_t columns, int element_bytes) {
  if (element_bytes == 4) return transpose<uint32_t>(from, from_stride, to, to_stride, rows, columns);
  if (element_bytes == 2) return transpose<uint16_t>(from, from_stride, to, to_stride, rows, columns);
  transpose<uint8_t>(from, from_stride, to, to_stride, rows, columns);
}

}  // namespace sparse24::cpu
