// CUTLASS's sparse GEMMs with the tiles that suit large products, for the kernel report to set beside ours.
//
// With -DKERNEL=f16_128x128 this is that kernel, as PTX; without, a library that tells how to launch each of them.
#include <cstdint>
#include <cstring>
#include <string_view>

#include "cutlass/epilogue/thread/linear_combination.h"
#include "cutlass/gemm/device/gemm_sparse.h"

namespace tiles {

using cutlass::gemm::GemmShape;
using cutlass::layout::ColumnMajor;
using cutlass::layout::RowMajor;

// D [m, n] = A [m, k] B [n, k]^T in the type of the operands: tiles of M x N x 128 bytes of K, warps of 64 x 64.
template <class Element, class Sum, int M, int N>
struct Sparse {
  static constexpr int K = 1024 / cutlass::sizeof_bits<Element>::value;
  using Epilogue =
      cutlass::epilogue::thread::LinearCombination<Element, 128 / cutlass::sizeof_bits<Element>::value, Sum, float>;
  using Swizzle = cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>;
  using Gemm =
      cutlass::gemm::device::SparseGemm<Element, RowMajor, Element, ColumnMajor, Element, RowMajor, Sum,
                                        cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, GemmShape<M, N, K>,
                                        GemmShape<64, 64, K>, GemmShape<16, 8, K / 2>, Epilogue, Swizzle, 3>;
};

#define CUTLASS_TILES(M, N)                                              \
  using f16_##M##x##N = Sparse<cutlass::half_t, float, M, N>::Gemm;      \
  using bf16_##M##x##N = Sparse<cutlass::bfloat16_t, float, M, N>::Gemm; \
  using s8_##M##x##N = Sparse<int8_t, int32_t, M, N>::Gemm;
CUTLASS_TILES(128, 128)
CUTLASS_TILES(256, 128)
CUTLASS_TILES(128, 256)

}  // namespace tiles

#ifdef KERNEL
using Operator = tiles::KERNEL::GemmKernel;
template __global__ void cutlass::Kernel<Operator>(Operator::Params);
#else

struct Launch {
  uint32_t grid[3], threads, shared, argument_bytes;
};

namespace {

// addresses: of A, B, D and the metadata.
template <class Gemm>
void describe(int m, int n, int k, const uint64_t* addresses, Launch* launch, uint8_t* arguments) {
  using Kernel = typename Gemm::GemmKernel;
  using Params = typename Kernel::Params;
  using Tile = typename Gemm::ThreadblockShape;
  const auto tensor = [&]<class Element, class Layout>(int i, int rows, int columns) {
    return cutlass::TensorRef<Element, Layout>(reinterpret_cast<Element*>(addresses[i]),
                                               Layout::packed({rows, columns}));
  };
  const auto a = tensor.template operator()<typename Gemm::ElementA, typename Gemm::LayoutA>(0, m, k / Gemm::kSparse);
  const auto b = tensor.template operator()<typename Gemm::ElementB, typename Gemm::LayoutB>(1, k, n);
  const auto d = tensor.template operator()<typename Gemm::ElementC, typename Gemm::LayoutC>(2, m, n);
  const auto e = tensor.template operator()<typename Gemm::ElementE, typename Gemm::LayoutE>(
      3, m, k / Gemm::kSparse / Gemm::kElementsPerElementE);
  const typename Gemm::ThreadblockSwizzle swizzle;
  const auto grid = swizzle.get_tiled_shape({m, n, k}, {Tile::kM, Tile::kN, Tile::kK}, 1);
  const dim3 blocks = swizzle.get_grid_shape(grid);
  *launch = {{blocks.x, blocks.y, blocks.z},
             uint32_t(Kernel::kThreadCount),
             uint32_t(sizeof(typename Kernel::SharedStorage)),
             uint32_t(sizeof(Params))};
  if (arguments) {
    const Params params({m, n, k}, grid, a, b, d, d, e, {1.0f, 0.0f}, nullptr);
    std::memcpy(arguments, &params, sizeof params);
  }
}

}  // namespace

// False where there is no kernel of that name. With `arguments` null only *launch is set.
extern "C" bool cutlass_launch(const char* name, int m, int n, int k, const uint64_t* addresses, Launch* launch,
                               uint8_t* arguments) {
  const std::string_view asked = name;
  bool found = false;
  const auto offer = [&]<class Gemm>(std::string_view its) {
    if (its == asked) describe<Gemm>(m, n, k, addresses, launch, arguments), found = true;
  };
#define CUTLASS_OFFER(TILE)                                     \
  offer.template operator()<tiles::f16_##TILE>("f16_" #TILE);   \
  offer.template operator()<tiles::bf16_##TILE>("bf16_" #TILE); \
  offer.template operator()<tiles::s8_##TILE>("s8_" #TILE);
  CUTLASS_OFFER(128x128)
  CUTLASS_OFFER(256x128)
  CUTLASS_OFFER(128x256)
  return found;
}
#endif
