// The part of warp_forms() that is in runtime.cpp.
#pragma once
#include "csrc/ptx/isa.h"

namespace sparse24::ptx {

Forms runtime_forms();  // vprintf, __assertfail

}  // namespace sparse24::ptx
