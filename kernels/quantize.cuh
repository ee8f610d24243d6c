// How kernels/quantize.cu is launched: what host and kernel must agree on.
#pragma once

namespace sparse24::quantize {
constexpr int THREADS = 128;  // one block a row: a row of 384 to 16384 elements gives each thread 1 to 32 quads
}  // namespace sparse24::quantize
