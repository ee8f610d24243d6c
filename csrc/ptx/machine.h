// The machine: warps of 32 lanes in blocks, blocks in worker threads.
//
// A warp runs one group of lanes at a time, those with the lowest program counter first, so that diverged lanes meet
// again where their paths do. A group that has waited for long gets a turn (warp.cpp), so that lanes may wait for each
// other in loops. The warps of a block run one after another up to a barrier or the end of their slice. Blocks are
// independent; each worker thread runs its own.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "csrc/ptx/definedness.h"
#include "csrc/ptx/findings.h"
#include "csrc/ptx/memory.h"
#include "csrc/ptx/program.h"

namespace sparse24::ptx {

class Block;
class Launch;
class SharedMemory;  // shared_memory.h
class BlockOrder;    // block_order.h: which blocks have synchronised with which

enum class Numerics : uint8_t {
  IEEE,     // tensor cores as a chain of fused multiply-adds in float32, one rounding each, products in order of k
  SM_80,    // blocks of 8 products, 1 extra bit, truncation (A100, A2, Ada, L40S)
  SM_90,    // blocks of 16 products, 2 extra bits (H100, B200)
  FLOAT64,  // summed in float64, rounded once
};

enum class Order : uint8_t { FORWARD, REVERSE, RANDOM };

struct LaunchOptions {
  uint32_t grid[3] = {1, 1, 1}, block[3] = {1, 1, 1};
  std::vector<uint8_t> arguments;  // the parameter space, laid out as Program::parameters says
  uint32_t dynamic_shared = 0;     // bytes
  uint32_t checks = static_cast<uint32_t>(Check::ALL);
  bool counters = true;
  Numerics numerics = Numerics::SM_80;
  uint32_t sparse_products = 0;  // of mma.sp: products a block of the numerics takes; 0: as many as of a dense mma
  Order order = Order::FORWARD;  // of blocks, of warps in a block
  uint64_t seed = 0;             // of Order::RANDOM
  uint32_t threads = 1;
  uint64_t budget = 100'000'000;  // warp instructions a block may execute; the watchdog stops it there
};

struct LaunchResult {
  std::vector<Finding> findings;
  std::vector<OperationCounters> counters;  // one an operation
  uint64_t barriers = 0;                    // completed, all blocks
  uint64_t instructions = 0;                // executed by warps
  std::string printed;                      // by printf
};

// One copy that cp.async has under way: bytes captured at issue, written when its group is waited for.
struct AsyncCopy {
  uint32_t lanes;
  uint32_t group;  // the number of its group, counted for the lanes' warp; see Warp::committed
  uint32_t operation;
  uint8_t bytes;                // 4, 8, 16
  uint32_t destination[LANES];  // in shared memory
  alignas(16) uint8_t data[LANES][16];
};

class Warp {
 public:
  Block* block = nullptr;
  uint8_t* registers = nullptr;  // 64-byte aligned; Program::register_bytes
  uint32_t index = 0;            // in the block
  uint32_t started = 0;          // lanes that the block has threads for
  uint32_t alive = 0;            // lanes that have not exited
  uint32_t current = 0;          // index of the operation being executed, for findings
  uint32_t carry = 0;            // CC.CF, a bit a lane: PTX ISA, "Extended-Precision Integer Arithmetic Instructions"

  // The 32 values of a slot; T is uint32_t, uint64_t, or float, double, int32_t, int64_t over the same bytes.
  template <class T>
  T* lanes(Slot slot) {
    return reinterpret_cast<T*>(registers + slot);
  }
  uint32_t& predicate(Slot slot) { return *reinterpret_cast<uint32_t*>(registers + slot); }

  void find(Kind kind, uint32_t lane, uint64_t address, const std::string& message);
  template <class Message>  // where the message costs more than a literal
  void find_with(Kind kind, uint32_t lane, uint64_t address, Message&& message);

  // ---- control: warp.cpp ----
  enum class State : uint8_t { READY, SLEEPING, DONE };
  State state = State::READY;
  uint32_t pc[LANES] = {};             // of the lanes that wait or sleep: the operation they do so at
  uint32_t waiting = 0;                // lanes held at a CONVERGE or BARRIER operation until the others come
  uint32_t asleep = 0;                 // lanes that have arrived at a barrier of the block and wait for it
  std::vector<uint32_t> calls[LANES];  // return addresses

  // Runs until the warp sleeps at a barrier, is done, or has executed `slice` instructions.
  void run(uint64_t slice);
  void start(Block& block, uint32_t index);
  // Wakes lanes asleep at the barrier operation `at`.
  void wake(uint32_t lanes, uint32_t at);
  // Called where neither this warp nor another can go on: finds what the waiting lanes lack, and lets them go on.
  void force();
  bool split_arrival = false;  // at a barrier whose instruction is not the same for all: see force()

  Definedness undefined;  // initcheck's marks on registers

  // ---- cp.async: execute/memory.cpp ----
  std::vector<AsyncCopy> copies;   // oldest first
  uint32_t committed[LANES] = {};  // groups each lane has committed
  // Writes the copies of `lanes` whose group is numbered below `group[lane]`.
  void deliver(uint32_t lanes, const uint32_t* before_group);

  // ---- order within the warp, for racecheck: shadow ----
  // Accesses of lane b at times below synced[a][b] come before what lane a does now. Times are Block::time.
  uint32_t synced_all = 0;  // the same for every pair: the time of the last bar.warp.sync of the whole warp or barrier
  std::unique_ptr<uint32_t[][LANES]> synced;  // only where partial masks have been used

 private:
  // Lanes that go on at one operation.
  struct Group {
    uint32_t pc = 0, lanes = 0;
    uint64_t since = 0;  // executed_ when it last ran
  };
  void park(uint32_t pc, uint32_t lanes);
  bool choose();
  void settle();
  uint32_t next_meeting() const;
  void divert(const Operation& operation, uint32_t at, uint32_t lanes);
  void converge(const Operation& operation, uint32_t at, uint32_t lanes);
  uint32_t complete_set(const Operation& operation, uint32_t candidates, uint32_t& rest) const;
  void execute_together(const Operation& operation, uint32_t at, uint32_t lanes);
  void release();
  void check_set(const Operation& operation, uint32_t lanes);
  bool takes_whole_warp(const Operation& operation) const;
  uint32_t waiting_set(uint32_t at, uint32_t& needed);
  void force_set(uint32_t at);
  void count_execution(uint32_t at, uint32_t lanes);

  Group running_;        // no lanes: to be chosen
  Group parked_[LANES];  // the others that can go on, no two at one pc
  uint32_t parked_count_ = 0;
  bool fair_ = false;        // the running group has its turn although it is not the lowest; until fair_end_
  bool lanes_left_ = false;  // lanes have exited while others wait: those may be complete now
  uint64_t fair_end_ = 0;
  uint64_t executed_ = 0;  // operations, hidden ones included
};

// What bar.red computes; Operation::option[0] of every barrier instruction.
enum class Reduction : uint8_t { NONE, POPC, AND, OR };

// One of the 16 named barriers of a block. Whole warps arrive: a warp does when all its lanes that have not exited are
// there (PTX ISA, "bar, barrier").
struct Barrier {
  uint32_t expected = 0;     // threads; 0: nobody is here
  bool whole_block = false;  // no count was given
  Reduction reduction = Reduction::NONE;
  uint32_t operation = 0;           // of the first to come
  uint32_t arrived = 0;             // threads, 32 a warp
  uint32_t members = 0;             // warps that have arrived, sleeping or not
  uint32_t here[LANES] = {};        // of each warp: lanes that have come while others of it have not
  uint32_t sleeps[LANES] = {};      // of each warp: lanes that sleep until it is complete
  uint32_t truths = 0, voters = 0;  // bar.red: predicates that were true, and all
  uint32_t clock[LANES] = {};       // accesses of warp b below clock[b] come before the barrier's completion
};

// Lanes of a warp that come to barrier `id`; `expected` threads, 0 for all of the block.
struct Arrival {
  uint32_t lanes, id, expected;
  bool sleeps;  // .sync and .red: until the barrier is complete. .arrive: until the rest of the warp is there
  Reduction reduction;
  uint32_t truths;  // of its lanes, those whose predicate is true
};

class Block {
 public:
  Launch* launch = nullptr;
  const Program* program = nullptr;
  uint32_t coordinates[3] = {0, 0, 0};
  uint32_t number = 0;  // x + grid.x * (y + grid.y * z)
  uint32_t threads = 0;
  std::vector<Warp> warps;
  std::vector<uint8_t> local;  // [warp][lane][Program::local_bytes]
  std::vector<uint8_t> local_initialized;
  std::unique_ptr<SharedMemory> shared;
  Barrier barriers[16];
  std::vector<OperationCounters> counters;
  uint64_t barriers_completed = 0, instructions = 0;

  // Time of racecheck: goes on by one at each synchronisation within the block.
  uint32_t time = 1;
  // Accesses of warp b at times below synced[a][b] come before what warp a does now.
  uint32_t synced[LANES][LANES] = {};

  bool abandoned = false;  // after a trap, a deadlock, or at the end of its budget
  uint64_t spent = 0;      // of the budget: operations, hidden ones included

  // Sets the block up anew for `number`; the memory is kept from block to block.
  void start(Launch& launch, uint32_t number);
  // True when all warps are done; false when the slice is used up.
  bool run(uint64_t slice);
  // No message: it has been found already.
  void abandon(Kind kind, Warp& warp, const std::string& message);

  // Called by the handlers of bar and barrier (execute/barrier.cpp).
  void arrive(Warp& warp, const Arrival& arrival);
  // Lanes of the warp have exited: those that wait for them at a barrier may be all by now.
  void lanes_exited(Warp& warp);
  uint32_t line_of(uint32_t operation) const { return program->origins[operation].line; }

 private:
  void warp_arrives(Warp& warp, uint32_t id);
  void complete(uint32_t id);
  void resolve();
  std::string place_of_sleepers(uint32_t id) const;
  uint64_t random();

  std::unique_ptr<uint8_t[]> registers_;
  size_t register_bytes_ = 0;  // of registers_
  uint64_t random_ = 0;
  std::vector<uint32_t> turns_;  // the warps in the order in which they have their turn
};

class Launch {
 public:
  Launch(const Program& program, const LaunchOptions& options, const std::vector<uint64_t>& variable_addresses);
  ~Launch();
  const Program& program;
  const LaunchOptions& options;
  Memory& memory;
  Findings findings;
  std::vector<uint8_t> initial_registers;  // constants and addresses; specials are filled by Warp::start
  std::unique_ptr<BlockOrder> order;       // racecheck between blocks
  std::atomic<bool> interrupted{false};
  std::atomic<bool> stopped{false};  // by a trap or the watchdog: nothing more is run

  bool checks(Check check) const { return (options.checks & static_cast<uint32_t>(check)) != 0; }
  LaunchResult run();

  void fill_specials(Warp& warp) const;
  uint64_t number_of(uint64_t turn) const;  // the number of the block that is begun as the turn-th
  void print(const std::string& text);      // from vprintf, in the order of the calls

 private:
  class Worker;
  friend class Worker;
  std::atomic<uint64_t> next_block_{0};
  uint64_t blocks_ = 0;
  std::mutex printing_;
  std::string printed_;
};

template <class Message>
void Warp::find_with(Kind kind, uint32_t lane, uint64_t address, Message&& message) {
  Findings& findings = block->launch->findings;
  if (!findings.wanted(kind)) return;
  Finding finding{kind, current, {}, index, lane, address, {}, 1};
  for (int i = 0; i < 3; ++i) finding.block[i] = block->coordinates[i];
  findings.add(std::move(finding), std::forward<Message>(message));
}
inline void Warp::find(Kind kind, uint32_t lane, uint64_t address, const std::string& message) {
  find_with(kind, lane, address, [&] { return message; });
}

// Calls `body(lane)` for each lane of the mask; the whole warp is a plain loop, which compilers vectorise.
template <class Body>
inline void each(uint32_t lanes, Body&& body) {
  if (lanes == ~0u) {
    for (int lane = 0; lane < LANES; ++lane) body(lane);
  } else {
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) body(__builtin_ctz(rest));
  }
}

}  // namespace sparse24::ptx
