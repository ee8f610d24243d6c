// The epilogue of a dense product on AVX-512: that of the kernels.
#include "csrc/cpu/linear/linear_avx512.h"
#include "csrc/cpu/linear/linear_dense.h"

namespace sparse24::cpu {
namespace {

void finish_floats(const Linear& call, const Tile& tile, int64_t block, const float* sums) {
  finish_for<false>(call)(call, tile, block, reinterpret_cast<const __m512i*>(sums));
}

void finish_integers(const Linear& call, const Tile& tile, int64_t block, const int32_t* sums) {
  finish_for<true>(call)(call, tile, block, reinterpret_cast<const __m512i*>(sums));
}

}  // namespace

const DenseFinish AVX512_FINISH{finish_floats, finish_integers};

}  // namespace sparse24::cpu
