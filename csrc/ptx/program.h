// A kernel ready to run: a flat array of instructions over numbered register slots. decode.cpp makes it from the tree.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "csrc/ptx/syntax.h"
#include "csrc/ptx/types.h"

namespace sparse24::ptx {

class Warp;
struct Operation;

// Executes one instruction for the lanes of a mask, which is never 0 and holds only lanes that are alive and whose
// guard predicate is true.
using Handler = void (*)(Warp& warp, const Operation& operation, uint32_t lanes);

// A register slot is a byte offset into the register file of a warp:
//   registers of up to 32 bits  uint32_t[32], one a lane. 8- and 16-bit values are kept zero-extended: a handler that
//                               writes one writes 0 above it
//   64-bit registers            uint64_t[32]
//   predicates                  uint32_t, bit = lane (64 bytes apart, as all slots are)
// Constants, addresses of variables and fixed special registers (%tid.x, ...) are slots too, filled before a warp
// starts.
using Slot = uint32_t;
constexpr Slot NO_SLOT = ~0u;  // `_`, or an optional operand left out
constexpr int LANES = 32;
constexpr int MAX_OPERANDS = 8;

// What the warp's loop does with an instruction (warp.cpp).
enum class Flow : uint8_t {
  NEXT,            // run it, go on
  CONVERGE,        // wait until all lanes that must take part are here, then run it: `.sync` with a mask, `.aligned`
  BARRIER,         // converge, run it; the warp then sleeps if the handler has put it to sleep
  BRANCH,          // to `target`
  BRANCH_INDEXED,  // to Program::targets[target + index]: the index is in slot[0], there are `immediate` labels
  CALL,            // to `target`, pushing the return address
  RETURN,          // from a device function; from the kernel: EXIT
  EXIT,
  TRAP,
};

// Who has to be present at a CONVERGE or BARRIER instruction.
enum class Presence : uint8_t {
  ACTIVE,   // whoever is there
  MASK,     // the lanes named by the mask in slot `mask`
  ALIGNED,  // every lane of the warp that has not exited
};

// What becomes of the marks of undefined values (definedness.h).
enum class Use : uint8_t {
  PROPAGATE,     // a result is undefined in the lanes in which an operand is
  TENSOR,        // in the rows and columns that undefined operands reach: mma m16n8
  TENSOR_WHOLE,  // everywhere: the other shapes of mma
  LOAD,          // results are what was loaded; an address is used
  STORE,         // the bytes get the value's marks; an address is used
  REPORT,        // all operands are used
};

struct Operation {
  Handler run = nullptr;
  const Slot* slot = nullptr;  // operands as in the text, vectors flattened; see `count`
  int64_t offset[2] = {0, 0};  // of the first and second address operand: [slot + offset]
  int64_t immediate = 0;       // the operand that must be an immediate: a selector, a byte count, a lookup table
  Slot guard = NO_SLOT;        // predicate
  Slot mask = NO_SLOT;         // Presence::MASK
  uint32_t target = 0;         // Flow::BRANCH, CALL: index of an operation
  Flow flow = Flow::NEXT;
  Presence presence = Presence::ACTIVE;
  bool guard_negated = false;
  bool hidden = false;               // put there by decode.cpp (a widening, a copy of an argument): not counted
  Space space = Space::GENERIC;      // of the first address operand
  uint8_t address_wide[2] = {1, 1};  // whether that address's slot is of 64 bits
  uint8_t count[MAX_OPERANDS] = {};  // slots of each operand: 1, a vector's length, 0 where left out
  uint8_t wide = 0;                  // bit i: operand i is in 64-bit slots
  uint8_t slots = 0;                 // how many there are
  uint8_t results = 0;               // how many of them, the first ones, are written
  Use use = Use::PROPAGATE;
  uint8_t option[4] = {};  // what the family's choose() wants its handler to know
};

// Where an operation comes from, for findings and counters.
struct Origin {
  uint32_t line = 0, column = 0;  // in the PTX text
  SourceLine source;
  uint32_t opcode = 0;  // of Program::opcodes
};

// A slot that is filled before a warp starts.
struct Constant {
  Slot slot;
  bool wide;
  uint64_t bits;
  int32_t variable = -1;  // >= 0: plus the address of this variable of Module::variables (global or const space)
};

// %tid.x and the like: fixed for a lane, filled before a warp starts. What changes (%clock) is an operation.
enum class Special : uint8_t {
  TID_X,
  TID_Y,
  TID_Z,
  NTID_X,
  NTID_Y,
  NTID_Z,
  CTAID_X,
  CTAID_Y,
  CTAID_Z,
  NCTAID_X,
  NCTAID_Y,
  NCTAID_Z,
  LANEID,
  WARPID,
  NWARPID,
  SMID,
  NSMID,
  GRIDID,
  LANEMASK_EQ,
  LANEMASK_LE,
  LANEMASK_LT,
  LANEMASK_GE,
  LANEMASK_GT,
  DYNAMIC_SMEM_SIZE,
  TOTAL_SMEM_SIZE,
  AGGR_SMEM_SIZE,
  CLUSTER_CTAID_X,
  CLUSTER_CTAID_Y,
  CLUSTER_CTAID_Z,
  CLUSTER_NCTAID_X,
  CLUSTER_NCTAID_Y,
  CLUSTER_NCTAID_Z,
  CLUSTER_CTARANK,
  CLUSTER_NCTARANK,
  CLUSTERID_X,
  CLUSTERID_Y,
  CLUSTERID_Z,
  NCLUSTERID_X,
  NCLUSTERID_Y,
  NCLUSTERID_Z,
};

struct SpecialSlot {
  Slot slot;
  bool wide;
  Special special;
};

struct Parameter {
  std::string name;
  Type type;
  uint32_t offset, size, align;  // bytes
  bool pointer;                  // .ptr
  uint32_t pointer_align;
};

struct Program {
  std::string kernel;
  std::vector<Operation> operations;  // functions before those that call them, the kernel last
  std::vector<Origin> origins;        // one an operation
  std::vector<std::string> opcodes;   // "add.f32", with its modifiers
  std::vector<uint32_t> targets;      // of BRANCH_INDEXED
  std::vector<Slot> slots;            // what Operation::slot points into
  uint32_t entry = 0;                 // index of the kernel's first operation
  uint32_t register_bytes = 0;        // of a warp's register file
  std::vector<Constant> constants;
  std::vector<SpecialSlot> specials;
  std::vector<Parameter> parameters;
  uint32_t parameter_bytes = 0;
  uint32_t shared_bytes = 0;  // static; the dynamic part follows, at `dynamic_offset`
  uint32_t dynamic_offset = 0;
  uint32_t local_bytes = 0;  // of a lane: .local variables and the .param variables of calls
  uint32_t max_threads[3] = {0, 0, 0}, required_threads[3] = {0, 0, 0};
};

// An instruction, type or construct that is not supported, by name. The place is that of the instruction.
class Unsupported : public SyntaxError {
 public:
  using SyntaxError::SyntaxError;
};

// Throws SyntaxError (unknown names, wrong operands) or Unsupported. `module` must outlive nothing: names are copied.
std::unique_ptr<const Program> decode(const Module& module, const Function& kernel);

}  // namespace sparse24::ptx
