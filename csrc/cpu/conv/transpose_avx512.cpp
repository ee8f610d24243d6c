// transpose.h in AVX-512: tiles of 16 x 16, whatever the size of an element, as 32-bit lanes in between.
#include "csrc/cpu/conv/transpose.h"
#include "csrc/cpu/linear/vector_avx512.h"

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

template <int BYTES>
void transpose(const void* from, int64_t from_stride, void* to, int64_t to_stride, int64_t rows, int64_t columns) {
  const auto source = static_cast<const uint8_t*>(from);
  const auto target = static_cast<uint8_t*>(to);
  for (int64_t c = 0; c < columns; c += 16) {
    const __mmask16 column_mask = first_lanes(columns - c);
    for (int64_t r = 0; r < rows; r += 16) {
      __m512i tile[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        tile[i] = r + i < rows ? load<BYTES>(source + ((r + i) * from_stride + c) * BYTES, column_mask)
                               : _mm512_setzero_si512();
      }
      transpose_16(tile);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        if (c + i < columns) store<BYTES>(target + ((c + i) * to_stride + r) * BYTES, first_lanes(rows - r), tile[i]);
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
