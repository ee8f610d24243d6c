// What an access of a warp costs the memory: passes over the banks of shared memory, sectors of global memory.
//
// Shared memory has 32 banks of 4 bytes. Hardware takes 4-byte accesses of all lanes at once, 8-byte ones by
// half-warps, 16-byte ones by quarter-warps; each such group takes as many waves as the most distinct words in one
// bank. Global memory moves in sectors of 32 bytes, counted as if each buffer began at a multiple of 256 as
// cudaMalloc's do. Ideal: the fewest that the distinct bytes fill, at least one.
#pragma once
#include <cstdint>

#include "csrc/ptx/findings.h"

namespace sparse24::ptx {

// `address`: offsets in shared memory of the lanes in `lanes`, each a multiple of `size`, a power of two.
void count_shared(OperationCounters& counters, uint32_t lanes, const uint64_t* address, uint32_t size);
// `address`: of each lane, such that the buffer's first byte is a multiple of 256.
void count_global(OperationCounters& counters, uint32_t lanes, const uint64_t* address, uint32_t size);

}  // namespace sparse24::ptx
