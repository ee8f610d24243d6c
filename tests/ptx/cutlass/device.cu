// One of CUTLASS's kernels as PTX: nvcc --ptx -DGEMM=sparse_f16.
#include "gemms.h"

using Operator = gemms::GEMM::GemmKernel;
template __global__ void cutlass::Kernel<Operator>(Operator::Params);
