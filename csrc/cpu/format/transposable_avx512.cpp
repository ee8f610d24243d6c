// A band of transposable_mask() in AVX-512.
#include "csrc/cpu/format/transposable_kernels.h"

namespace sparse24::cpu {

void avx512_transposable_band(const float* scores, int64_t stride, int64_t columns, uint8_t* mask) {
  transposable_band_here(scores, stride, columns, mask);
}

}  // namespace sparse24::cpu
