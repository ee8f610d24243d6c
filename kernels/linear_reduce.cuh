// How kernels/linear_reduce.cu is launched: what host and kernel must agree on.
#pragma once
#include <cstdint>

namespace sparse24::reduce {
constexpr int THREADS = 256;  // four output features each
constexpr int64_t threads(int64_t tokens, int64_t out_features) { return tokens * ((out_features + 3) / 4); }
}  // namespace sparse24::reduce
