// y of a linear product on the CPU, by whatever is fastest there: the sparse kernels or a dense product of torch.
#pragma once
#include "csrc/cpu/linear/linear.h"

namespace sparse24 {

// Runs what cpu::choose() says.
//
// A dense product gives what cpu::linear() does, to the documented accuracy, and in integers exactly: W is decompressed
// some rows at a time (a few megabytes), products are summed in float32 or int32, and the epilogue is that of the
// kernels. An Inf or a NaN in a float x, which would reach outputs through dropped entries of W, takes the sparse
// kernels. One difference: where W, x and y are bfloat16 and the CPU has bfloat16 products, the sum with a bfloat16
// bias is rounded to bfloat16 before residual and activation, as in torch's own linear.
void linear_by_choice(const cpu::Linear& call);

}  // namespace sparse24
