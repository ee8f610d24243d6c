// transposable_mask(): the choice of the ISA, and plain C++.
#include "csrc/cpu/format/transposable.h"

#include "csrc/cpu/format/transposable_kernels.h"
#include "csrc/cpu/isa.h"
#include "csrc/cpu/parallel.h"

namespace sparse24::cpu {
namespace {

void portable(const float* scores, int64_t stride, int64_t columns, uint8_t* mask) {
  transposable_band_here(scores, stride, columns, mask);
}

TransposableBand for_this_cpu() {
#if defined(__x86_64__)
  if (active_isa() >= Isa::AVX512) return avx512_transposable_band;
  if (active_isa() >= Isa::AVX2) return avx2_transposable_band;
#endif
  return portable;
}

}  // namespace

void transposable_mask(const float* scores, int64_t stride, int64_t rows, int64_t columns, uint8_t* mask) {
  const TransposableBand run = for_this_cpu();
  constexpr int64_t GRAIN_ENTRIES = 8192;  // about 25 us in AVX-512
  parallel_for(0, rows / TILE, GRAIN_ENTRIES / (TILE * columns + 1) + 1, [&](int64_t first, int64_t last) {
    for (int64_t band = first; band < last; ++band) {
      run(scores + band * TILE * stride, stride, columns, mask + band * TILE * columns);
    }
  });
}

}  // namespace sparse24::cpu
