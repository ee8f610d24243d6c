// Control flow, which the warp's loop does, and instructions that leave no trace in what a kernel computes. Calls are
// decode.cpp's. Source: PTX ISA, "Control Flow Instructions", "Miscellaneous Instructions", griddepcontrol.
#include "csrc/ptx/isa.h"
#include "csrc/ptx/machine.h"

namespace sparse24::ptx {
namespace {

template <Flow FLOW>
bool flow(const Chosen&, Operation& operation) {
  operation.flow = FLOW;
  return true;
}

// - brkpt waits for a debugger, and none is there;
// - nanosleep may sleep for no time at all;
// - pmevent counts in counters of the host's;
// - griddepcontrol orders grids, and here each runs after the one before is done.
bool nothing(const Chosen&, Operation& operation) {
  operation.run = [](Warp&, const Operation&, uint32_t) {};
  return true;
}

bool event(const Chosen& chosen, Operation& operation) {
  const int64_t last = chosen.has("mask") ? 0xffff : 15;
  return operation.immediate >= 0 && operation.immediate <= last && nothing(chosen, operation);
}

constexpr Form FORMS[] = {
    {"bra", "uni?", "label", flow<Flow::BRANCH>},
    {"brx", "idx uni?", "u32, labels", flow<Flow::BRANCH_INDEXED>},
    {"ret", "uni?", "", flow<Flow::RETURN>},
    {"exit", "", "", flow<Flow::EXIT>},
    {"trap", "", "", flow<Flow::TRAP>},
    {"brkpt", "", "", nothing},
    {"nanosleep", "u32", "u32", nothing},
    {"pmevent", "mask?", "i", event},
    {"griddepcontrol", "launch_dependents|wait", "", nothing},
};

}  // namespace

Forms control_forms() { return FORMS; }

}  // namespace sparse24::ptx
