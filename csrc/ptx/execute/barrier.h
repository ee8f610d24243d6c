// The part of warp_forms() that is in barrier.cpp, and what it shares with warp.cpp.
#pragma once
#include "csrc/ptx/isa.h"
#include "csrc/ptx/machine.h"

namespace sparse24::ptx {

Forms barrier_forms();  // bar, barrier, bar.warp

// For the instructions that wait for all lanes of their mask; the others wait for those that have not exited.
void find_exited_members(Warp& warp, const Operation& operation, uint32_t lanes);

}  // namespace sparse24::ptx
