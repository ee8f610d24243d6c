// The parts of memory_forms(), each beside its handlers.
#pragma once
#include "csrc/ptx/isa.h"

namespace sparse24::ptx {

Forms atomic_forms();      // atom, red
Forms async_copy_forms();  // cp.async
Forms matrix_forms();      // ldmatrix, stmatrix, movmatrix
Forms fence_forms();       // fence, membar, and what only caches see: prefetch, discard, applypriority, createpolicy

// Operation::option[0] of operations that may synchronise.
constexpr uint8_t STRONG = 1;   // volatile, relaxed and stronger
constexpr uint8_t ORDERED = 2;  // with release or acquire semantics of its own
constexpr uint8_t DEVICE = 4;   // of wider scope than the block

}  // namespace sparse24::ptx
