// How kernels/pack.cu is launched: what host and kernel must agree on.
#pragma once

namespace sparse24::packed {
constexpr int THREADS = 256;  // a word each
}  // namespace sparse24::packed
