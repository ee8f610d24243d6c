// What the checks find, and what is counted. A finding of one kind at one instruction is kept once, with its first
// place and how often it came.
#pragma once
#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace sparse24::ptx {

enum class Check : uint32_t {
  MEMORY = 1,   // memcheck: out of bounds, misaligned, freed
  INIT = 2,     // initcheck: bytes read before any write
  RACE = 4,     // racecheck: accesses of different threads that nothing orders, one of them a write
  SYNC = 8,     // synccheck: divergent barriers, wrong masks, exited lanes
  ASYNC = 16,   // bytes of a cp.async touched before its group was waited for
  TENSOR = 32,  // selectors and metadata that mma.sp leaves undefined
  ALL = 63,
};

// Which check reports a kind is fixed: see check_of.
enum class Kind : uint8_t {
  OUT_OF_BOUNDS,          // MEMORY
  MISALIGNED,             // MEMORY
  FREED,                  // MEMORY
  READ_ONLY,              // MEMORY: a write to .const or to a kernel parameter
  UNINITIALIZED,          // INIT
  RACE_SHARED,            // RACE: between warps
  RACE_WARP,              // RACE: between lanes of one warp
  RACE_GLOBAL,            // RACE: between blocks
  DIVERGENT_BARRIER,      // SYNC: lanes of a warp, or warps of a block, that cannot meet
  DIVERGENT_INSTRUCTION,  // SYNC: `.aligned` or `.sync` without all the lanes it needs
  WRONG_MASK,             // SYNC: an executing lane that its own member mask leaves out, or an empty mask
  EXITED_LANE,            // SYNC: a mask or barrier that counts on lanes that have exited
  ASYNC_IN_FLIGHT,        // ASYNC
  BAD_SELECTOR,           // TENSOR
  BAD_METADATA,           // TENSOR
  DEADLOCK,               // always reported, as all that follow; the block is abandoned
  BUDGET,                 // the watchdog's
  TRAP,                   // trap, and __assertfail
  ILLEGAL,                // what the ISA leaves undefined and hardware faults on
};
constexpr int KINDS = 19;
const char* name_of(Kind kind);  // "out_of_bounds"
uint32_t check_of(Kind kind);    // its Check bit; 0: always reported

struct Finding {
  Kind kind;
  uint32_t operation = 0;  // index in Program::operations: line and opcode follow from it
  uint32_t block[3] = {0, 0, 0};
  uint32_t warp = 0, lane = 0;
  uint64_t address = 0;
  std::string message;  // one sentence with the numbers: "read of 16 bytes at offset 4096 of a buffer of 4096"
  uint64_t count = 1;
};

// Shared by the threads of a launch.
class Findings {
 public:
  explicit Findings(uint32_t checks) : checks_(checks) {}
  // Whether a finding of this kind would be kept: ask before building a message.
  bool wanted(Kind kind) const { return check_of(kind) == 0 || (checks_ & check_of(kind)) != 0; }
  // Keeps the first of its kind at its operation, counts the rest. `message` is called only for the first.
  template <class Message>
  void add(Finding finding, Message&& message) {
    std::lock_guard lock(mutex_);
    const uint64_t key = (static_cast<uint64_t>(finding.kind) << 32) | finding.operation;
    auto [it, first] = index_.try_emplace(key, found_.size());
    if (!first) {
      ++found_[it->second].count;
      return;
    }
    finding.message = message();
    found_.push_back(std::move(finding));
  }
  std::vector<Finding> take() { return std::move(found_); }

 private:
  uint32_t checks_;
  std::mutex mutex_;
  std::map<uint64_t, size_t> index_;
  std::vector<Finding> found_;
};

// Counted for each operation of the program; each worker thread has its own and they are added up at the end.
struct OperationCounters {
  uint64_t warps = 0;                             // executions by a warp
  uint64_t lanes = 0;                             // by a lane
  uint64_t diverged = 0;                          // of a branch: executions that split the warp
  uint64_t shared_waves = 0, shared_ideal = 0;    // passes over the banks; the fewest that the bytes need
  uint64_t global_sectors = 0, global_ideal = 0;  // 32-byte sectors touched; the fewest that the bytes need
  uint64_t bytes = 0;                             // moved, in the operation's space
};

}  // namespace sparse24::ptx
