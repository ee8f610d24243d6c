// transpose.h in AVX-512: tiles of 16 x 16, whatever the size of an element, as 32-bit lanes in between.
#include "csrc/cpu/linear/vector_avx512.h"
#include "csrc/cpu/transpose.h"

namespace sparse24::cpu {
namespace {

template <int BYTES>
SPARSE24_INLINE __m512i load(const uint8_t* at, __mmask16 mask) {
  if constexpr (BYTES == 4) return _mm512_maskz_loadu_epi32(mask, at);
  if constexpr (BYTES == 2) return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, at));
  return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, at));
}

template <int BYTES>
SPARSE24_INLINE void store(uint8_t* at, __mmask16 mask, __m512i v) {
  if constexpr (BYTES == 4) return _mm512_mask_storeu_epi32(at, mask, v);
  if constexpr (BYTES == 2) return _mm256_mask_storeu_epi16(at, mask, _mm512_cvtepi32_epi16(v));
  _mm_mask_storeu_epi8(at, mask, _mm512_cvtepi32_epi8(v));
}

// to[c][r] = from[r][c] for up to 16 x 16 elements. Whole tiles know their masks, so that stores have none: with one
// they take five times as long (Zen 4).
template <int BYTES>
SPARSE24_INLINE void transpose_tile(const uint8_t* from, int64_t from_row, uint8_t* to, int64_t to_row, int64_t rows,
                                    int64_t columns) {
  const __mmask16 row_mask = first_lanes(rows), column_mask = first_lanes(columns);
  __m512i tile[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    tile[i] = i < rows ? load<BYTES>(from + i * from_row, column_mask) : _mm512_setzero_si512();
  }
  transpose_16(tile);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if (i < columns) store<BYTES>(to + i * to_row, row_mask, tile[i]);
  }
}

template <int BYTES>
void transpose(const void* from, int64_t from_stride, void* to, int64_t to_stride, int64_t rows, int64_t columns) {
  const int64_t from_row = from_stride * BYTES, to_row = to_stride * BYTES;
  for (int64_t c = 0; c < columns; c += 16) {
    for (int64_t r = 0; r < rows; r += 16) {
      const uint8_t* const source = static_cast<const uint8_t*>(from) + r * from_row + c * BYTES;
      uint8_t* const target = static_cast<uint8_t*>(to) + c * to_row + r * BYTES;
      if (rows - r >= 16 && columns - c >= 16) {
        transpose_tile<BYTES>(source, from_row, target, to_row, 16, 16);
      } else {
        transpose_tile<BYTES>(source, from_row, target, to_row, rows - r, columns - c);
      }
    }
  }
}

}  // namespace

void avx512_transpose(const void* from, int64_t from_stride, void* to, int64_t to_stride, int64_t rows, int64_t columns,
                      int element_bytes) {
  if (element_bytes == 4) return transpose<4>(from, from_stride, to, to_stride, rows, columns);
  if (element_bytes == 2) return transpose<2>(from, from_stride, to, to_stride, rows, columns);
  transpose<1>(from, from_stride, to, to_stride, rows, columns);
}

}  // namespace sparse24::cpu
