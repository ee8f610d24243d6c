// A band of transposable_mask() in AVX2.
#include "csrc/cpu/format/transposable_kernels.h"

namespace sparse24::cpu {

void avx2_transposable_band(const float* scores, int64_t stride, int64_t columns, uint8_t* mask) {
  transposable_band_here(scores, stride, columns, mask);
}

}  // namespace sparse24::cpu
