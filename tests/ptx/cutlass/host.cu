// What test_cutlass.py needs of CUTLASS on the host, as a library: random small integers in the kernel's formats,
// sparse metadata in the order that the kernel reads, the parameters of a launch, and the product by CUTLASS's own
// reference.
//
// No CUDA call is made: tensors are plain arrays of the caller.
#include <cstdint>
#include <cstring>
#include <random>
#include <string_view>
#include <type_traits>
#include <vector>

#include "cutlass/util/host_reorder.h"
#include "cutlass/util/host_uncompress.h"
#include "cutlass/util/reference/host/gemm.h"
#include "cutlass/util/reference/host/tensor_fill.h"
#include "gemms.h"

// What the C functions below share with test_cutlass.py.
struct Sizes {  // bytes of each tensor and of what else the kernel works with, as test_cutlass.py allocates them
  uint64_t a, b, c, metadata;
};
struct Shape {
  int32_t m, n, k;
};
struct Tensors {  // of the host, or device addresses
  void *a, *b, *c, *d;
  void* metadata;  // of a sparse GEMM; of one that splits K, the semaphores of its tiles, which start as zeros
};
struct LaunchShape {
  uint32_t grid[3], threads, shared, argument_bytes;
};

namespace {

using cutlass::MatrixCoord;
using cutlass::TensorRef;
using cutlass::gemm::GemmCoord;

template <class Gemm, class = void>
struct Sparsity {  // of a dense GEMM: none, and metadata of no elements
  static constexpr int DIVISOR = 1;
  static constexpr size_t metadata_bytes(int, int) { return 0; }
};
template <class Gemm>
struct Sparsity<Gemm, std::void_t<typename Gemm::ElementE>> {
  static constexpr int DIVISOR = Gemm::kSparse;
  static constexpr int columns(int k) { return k / Gemm::kSparse / Gemm::kElementsPerElementE; }
  static constexpr size_t metadata_bytes(int m, int k) { return sizeof(typename Gemm::ElementE) * m * columns(k); }
};
template <class Gemm>
constexpr bool IS_SPARSE = Sparsity<Gemm>::DIVISOR > 1;

template <class Element, class Layout>
auto packed(void* data, int rows, int columns) {
  return TensorRef<Element, Layout>(static_cast<Element*>(data), Layout::packed({rows, columns}));
}

template <class Element>
size_t bytes_of(int rows, int columns) {
  return size_t(rows) * columns * cutlass::sizeof_bits<Element>::value / 8;
}

template <class Element, class Layout>
void fill(TensorRef<Element, Layout> tensor, int rows, int columns, std::mt19937& random) {
  std::uniform_int_distribution<int> value(-3, 3);
  for (int row = 0; row < rows; ++row)
    for (int column = 0; column < columns; ++column) tensor.at({row, column}) = Element(value(random));
}

// Everything of one GEMM type.
template <class Gemm>
struct Case {
  using A = typename Gemm::ElementA;
  using B = typename Gemm::ElementB;
  using C = typename Gemm::ElementC;
  using LayoutA = typename Gemm::LayoutA;
  using LayoutB = typename Gemm::LayoutB;
  using LayoutC = typename Gemm::LayoutC;
  using Accumulator = typename Gemm::ElementAccumulator;
  using Params = typename Gemm::GemmKernel::Params;
  static constexpr int DIVISOR = Sparsity<Gemm>::DIVISOR;

  static GemmCoord tiles(Shape s) {
    using Tile = typename Gemm::ThreadblockShape;
    return typename Gemm::ThreadblockSwizzle().get_tiled_shape(GemmCoord(s.m, s.n, s.k), {Tile::kM, Tile::kN, Tile::kK},
                                                               gemms::SPLITS<Gemm>);
  }

  static Sizes sizes(Shape s) {
    const GemmCoord grid = tiles(s);
    return {bytes_of<A>(s.m, s.k / DIVISOR), bytes_of<B>(s.k, s.n), bytes_of<C>(s.m, s.n),
            IS_SPARSE<Gemm> ? Sparsity<Gemm>::metadata_bytes(s.m, s.k) : sizeof(int) * grid.m() * grid.n()};
  }

  // Fills a, b, c and metadata, and d with the result to expect: alpha a b + beta c.
  static void make(Shape s, uint32_t seed, int alpha, int beta, Tensors t) {
    std::mt19937 random(seed);
    auto a = packed<A, LayoutA>(t.a, s.m, s.k / DIVISOR);
    auto b = packed<B, LayoutB>(t.b, s.k, s.n);
    auto c = packed<C, LayoutC>(t.c, s.m, s.n);
    auto d = packed<C, LayoutC>(t.d, s.m, s.n);
    fill(a, s.m, s.k / DIVISOR, random);
    fill(b, s.k, s.n, random);
    fill(c, s.m, s.n, random);
    std::vector<uint8_t> dense;
    auto whole = a;
    if constexpr (IS_SPARSE<Gemm>) {
      using E = typename Gemm::ElementE;
      const int columns = Sparsity<Gemm>::columns(s.k);
      std::vector<E> words(size_t(s.m) * columns);
      auto metadata = packed<E, cutlass::layout::RowMajor>(words.data(), s.m, columns);
      cutlass::reference::host::TensorFillRandomSparseMeta(
          cutlass::TensorView<E, cutlass::layout::RowMajor>(metadata, MatrixCoord(s.m, columns)), seed,
          Gemm::kMetaSizeInBits);
      cutlass::reorder_meta(packed<E, typename Gemm::LayoutE>(t.metadata, s.m, columns), metadata, {s.m, s.n, columns});
      dense.resize(bytes_of<A>(s.m, s.k));
      whole = packed<A, LayoutA>(dense.data(), s.m, s.k);
      cutlass::uncompress(whole, a, metadata, s.m, s.k);
    }
    cutlass::reference::host::compute_gemm<A, LayoutA, B, LayoutB, C, LayoutC, Accumulator, Accumulator>(
        GemmCoord(s.m, s.n, s.k), Accumulator(alpha), whole, b, Accumulator(beta), c, d, Accumulator(0));
  }

  // The launch of the kernel for tensors at device addresses, and whether CUTLASS accepts the problem.
  static bool launch(Shape s, int alpha, int beta, Tensors t, LaunchShape* shape, uint8_t* arguments) {
    const GemmCoord problem(s.m, s.n, s.k);
    auto a = packed<A, LayoutA>(t.a, s.m, s.k / DIVISOR);
    auto b = packed<B, LayoutB>(t.b, s.k, s.n);
    auto c = packed<C, LayoutC>(t.c, s.m, s.n);
    auto d = packed<C, LayoutC>(t.d, s.m, s.n);
    const typename Gemm::EpilogueOutputOp::Params epilogue{Accumulator(alpha), Accumulator(beta)};
    cutlass::Status status;
    // Padding has to be the same in every run.
    alignas(Params) uint8_t bytes[sizeof(Params)] = {};
    if constexpr (IS_SPARSE<Gemm>) {
      auto e = packed<typename Gemm::ElementE, typename Gemm::LayoutE>(t.metadata, s.m, Sparsity<Gemm>::columns(s.k));
      status = Gemm::GemmKernel::can_implement(problem, a, b, c, d, e);
      new (bytes) Params{problem, tiles(s), a, b, c, d, e, epilogue, nullptr};
    } else {
      status = Gemm::GemmKernel::can_implement(problem, a, b, c, d);
      new (bytes) Params{problem, tiles(s), a, b, c, d, epilogue, static_cast<int*>(t.metadata)};
    }
    const dim3 grid = typename Gemm::ThreadblockSwizzle().get_grid_shape(tiles(s));
    *shape = {{grid.x, grid.y, grid.z},
              uint32_t(Gemm::GemmKernel::kThreadCount),
              uint32_t(sizeof(typename Gemm::GemmKernel::SharedStorage)),
              uint32_t(sizeof(Params))};
    if (arguments) std::memcpy(arguments, bytes, sizeof bytes);
    return status == cutlass::Status::kSuccess;
  }
};

// Calls `body` with the case of that name; false where there is none.
template <class Body>
bool with(std::string_view name, Body body) {
  if (name == "sparse_f16") return body(Case<gemms::sparse_f16>{}), true;
  if (name == "sparse_bf16") return body(Case<gemms::sparse_bf16>{}), true;
  if (name == "sparse_s8") return body(Case<gemms::sparse_s8>{}), true;
  if (name == "sparse_s4") return body(Case<gemms::sparse_s4>{}), true;
  if (name == "sparse_tf32") return body(Case<gemms::sparse_tf32>{}), true;
  if (name == "dense_f16") return body(Case<gemms::dense_f16>{}), true;
  if (name == "dense_f16_transposed") return body(Case<gemms::dense_f16_transposed>{}), true;
  if (name == "dense_f16_split") return body(Case<gemms::dense_f16_split>{}), true;
  if (name == "dense_s8") return body(Case<gemms::dense_s8>{}), true;
  return false;
}

}  // namespace

// All return whether the case exists and CUTLASS takes the shape.
extern "C" {

bool cutlass_sizes(const char* name, Shape shape, Sizes* sizes) {
  return with(name, [&](auto gemm) { *sizes = gemm.sizes(shape); });
}

bool cutlass_make(const char* name, Shape shape, uint32_t seed, int alpha, int beta, Tensors tensors) {
  return with(name, [&](auto gemm) { gemm.make(shape, seed, alpha, beta, tensors); });
}

// With `arguments` null, only *launch is set: how many bytes the arguments have.
bool cutlass_launch(const char* name, Shape shape, int alpha, int beta, Tensors tensors, LaunchShape* launch,
                    uint8_t* arguments) {
  bool accepted = false;
  return with(name, [&](auto gemm) { accepted = gemm.launch(shape, alpha, beta, tensors, launch, arguments); }) &&
         accepted;
}
}
