// kept_by_splits(): the choice of the ISA, and plain C++.
#include "csrc/cpu/permutation/permutation.h"

#include "csrc/cpu/isa.h"
#include "csrc/cpu/parallel.h"
#include "csrc/cpu/permutation/permutation_kernels.h"

namespace sparse24::cpu {
namespace {

void portable(const float* sizes, int64_t rows, const int64_t* eights, int64_t count, double* kept) {
  kept_by_splits_here(sizes, rows, eights, count, kept);
}

KeptBySplits for_this_cpu() {
#if defined(__x86_64__)
  if (active_isa() >= Isa::AVX512) return avx512_kept_by_splits;
  if (active_isa() >= Isa::AVX2) return avx2_kept_by_splits;
#endif
  return portable;
}

}  // namespace

void kept_by_splits(const float* sizes, int64_t rows, const int64_t* eights, int64_t count, double* kept) {
  const KeptBySplits run = for_this_cpu();
  constexpr int64_t GRAIN_ROWS = 4096;  // about 25 us in AVX-512
  parallel_for(0, count, GRAIN_ROWS / (rows + 1) + 1, [&](int64_t first, int64_t last) {
    run(sizes, rows, eights + first * SPLIT_COLUMNS, last - first, kept + first * SPLITS);
  });
}

}  // namespace sparse24::cpu
