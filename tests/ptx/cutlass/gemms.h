// The GEMMs of CUTLASS that test_cutlass.py runs: small tiles, so that they compile fast and a small problem has edges.
//
// device.cu compiles one of them to PTX, host.cpp makes inputs, parameters and references for all of them.
#pragma once
#include "cutlass/epilogue/thread/linear_combination.h"
#include "cutlass/gemm/device/gemm.h"
#include "cutlass/gemm/device/gemm_sparse.h"

namespace gemms {

using cutlass::bfloat16_t;
using cutlass::half_t;
using cutlass::int4b_t;
using cutlass::tfloat32_t;
using cutlass::arch::OpClassTensorOp;
using cutlass::arch::Sm80;
using cutlass::gemm::GemmShape;
using cutlass::layout::ColumnMajor;
using cutlass::layout::RowMajor;
using Swizzle = cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>;

// D = alpha A B + beta C, with vectors of 16 bytes.
template <class Output, class Accumulator>
using Epilogue = cutlass::epilogue::thread::LinearCombination<Output, 128 / cutlass::sizeof_bits<Output>::value,
                                                              Accumulator, Accumulator>;

template <class Element, class Output, class Accumulator, class Tile, class WarpTile, class Instruction, int STAGES>
using Sparse = cutlass::gemm::device::SparseGemm<Element, RowMajor, Element, ColumnMajor, Output, RowMajor, Accumulator,
                                                 OpClassTensorOp, Sm80, Tile, WarpTile, Instruction,
                                                 Epilogue<Output, Accumulator>, Swizzle, STAGES>;

using sparse_f16 = Sparse<half_t, half_t, float, GemmShape<64, 64, 64>, GemmShape<32, 32, 64>, GemmShape<16, 8, 32>, 3>;
using sparse_bf16 =
    Sparse<bfloat16_t, float, float, GemmShape<64, 64, 64>, GemmShape<32, 32, 64>, GemmShape<16, 8, 32>, 3>;
using sparse_s8 =
    Sparse<int8_t, int32_t, int32_t, GemmShape<64, 64, 128>, GemmShape<32, 32, 128>, GemmShape<16, 8, 64>, 3>;
using sparse_s4 =
    Sparse<int4b_t, int32_t, int32_t, GemmShape<64, 64, 256>, GemmShape<32, 32, 256>, GemmShape<16, 8, 128>, 3>;
using sparse_tf32 =
    Sparse<tfloat32_t, float, float, GemmShape<64, 64, 32>, GemmShape<32, 32, 32>, GemmShape<16, 8, 16>, 3>;

template <class Element, class LayoutA, class LayoutB, class Output, class Accumulator, class Tile, class WarpTile,
          class Instruction, int STAGES>
using Dense =
    cutlass::gemm::device::Gemm<Element, LayoutA, Element, LayoutB, Output, RowMajor, Accumulator, OpClassTensorOp,
                                Sm80, Tile, WarpTile, Instruction, Epilogue<Output, Accumulator>, Swizzle, STAGES>;

using dense_f16 = Dense<half_t, RowMajor, ColumnMajor, half_t, float, GemmShape<64, 64, 32>, GemmShape<32, 32, 32>,
                        GemmShape<16, 8, 16>, 4>;
// Both operands transposed in shared memory (ldmatrix.trans), accumulated in half precision.
using dense_f16_transposed = Dense<half_t, ColumnMajor, RowMajor, half_t, half_t, GemmShape<64, 64, 32>,
                                   GemmShape<32, 32, 32>, GemmShape<16, 8, 16>, 3>;
using dense_s8 = Dense<int8_t, RowMajor, ColumnMajor, int32_t, int32_t, GemmShape<64, 64, 64>, GemmShape<32, 32, 64>,
                       GemmShape<16, 8, 32>, 3>;

// The steps of K in three parts, each of another block, which add to the result one after the other: a block waits for
// the one before it at a semaphore in global memory.
using dense_f16_split =
    cutlass::gemm::device::Gemm<half_t, RowMajor, half_t, ColumnMajor, float, RowMajor, float, OpClassTensorOp, Sm80,
                                GemmShape<64, 64, 32>, GemmShape<32, 32, 32>, GemmShape<16, 8, 16>,
                                Epilogue<float, float>, Swizzle, 3, 8, 8, true>;
template <class Gemm>
constexpr int SPLITS = Gemm::kSplitKSerial ? 3 : 1;

}  // namespace gemms
