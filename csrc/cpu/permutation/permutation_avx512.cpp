// kept_by_splits() in AVX-512.
#include "csrc/cpu/permutation/permutation_kernels.h"

namespace sparse24::cpu {

void avx512_kept_by_splits(const float* sizes, int64_t rows, const int64_t* eights, int64_t count, double* kept) {
  kept_by_splits_here(sizes, rows, eights, count, kept);
}

}  // namespace sparse24::cpu
