// transpose.h, and its transposition in plain C++: square tiles, so that both sides stay in the L1.
#include "csrc/cpu/transpose.h"

#include <algorithm>

#include "csrc/cpu/isa.h"
#include "csrc/cpu/parallel.h"

namespace sparse24::cpu {
namespace {

template <class Value>
void transpose_tiles(const void* from, int64_t from_stride, void* to, int64_t to_stride, int64_t rows,
                     int64_t columns) {
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
  if (element_bytes == 4) return transpose_tiles<uint32_t>(from, from_stride, to, to_stride, rows, columns);
  if (element_bytes == 2) return transpose_tiles<uint16_t>(from, from_stride, to, to_stride, rows, columns);
  transpose_tiles<uint8_t>(from, from_stride, to, to_stride, rows, columns);
}

Transpose transposition() {
#if defined(__x86_64__)
  if (active_isa() >= Isa::AVX512) return avx512_transpose;
#endif
  return portable_transpose;
}

void transpose(const void* from, int64_t from_stride, void* to, int64_t rows, int64_t columns, int element_bytes) {
  const Transpose run = transposition();
  constexpr int64_t RUN = 64;  // columns at a time: whole cache lines of `from`
  parallel_for(0, (columns + RUN - 1) / RUN, 16384 / (RUN * rows + 1) + 1, [&](int64_t first, int64_t last) {
    const int64_t begin = first * RUN, count = std::min(last * RUN, columns) - begin;
    run(static_cast<const uint8_t*>(from) + begin * element_bytes, from_stride,
        static_cast<uint8_t*>(to) + begin * rows * element_bytes, rows, rows, count, element_bytes);
  });
}

}  // namespace sparse24::cpu
