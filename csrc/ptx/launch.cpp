// A launch: initial registers, and the worker threads that run its blocks.
#include <algorithm>
#include <cstring>
#include <deque>
#include <exception>
#include <numeric>
#include <stdexcept>
#include <thread>

#include "csrc/ptx/block_order.h"
#include "csrc/ptx/machine.h"
#include "csrc/ptx/shared_memory.h"

namespace sparse24::ptx {
namespace {

// Operations after which a block that makes no progress makes room for another. Blocks may wait for each other in
// loops (semaphores, barriers of the whole grid).
constexpr uint64_t SLICE = uint64_t{1} << 17;
constexpr int PATIENCE = 16;  // slices in a row of a block that makes progress
// Blocks begun and set aside by a worker: as many as RESIDENT_BYTES hold, at least MIN_RESIDENT. So a launch needs,
// next to its buffers, threads * max(RESIDENT_BYTES, MIN_RESIDENT * block) bytes at most, and threads * block where no
// block waits for another. A block is its registers, its local memory (twice, with initcheck), its shared memory and
// four times that for what is known of it.
constexpr uint64_t RESIDENT_BYTES = uint64_t{256} << 20;
constexpr uint64_t MIN_RESIDENT = 4, MAX_RESIDENT = 4096;
constexpr uint32_t MULTIPROCESSORS = 128;  // what %nsmid says

template <class Cell, class Value>
void fill(Warp& warp, Slot slot, Value&& value) {
  for (uint32_t lane = 0; lane < LANES; ++lane) warp.lanes<Cell>(slot)[lane] = value(lane);
}

// The value of a special register in one lane.
uint32_t value_of(Special special, const Block& block, uint32_t warp, uint32_t lane) {
  const LaunchOptions& options = block.launch->options;
  const uint32_t thread = warp * LANES + lane;
  const uint32_t shared = block.program->dynamic_offset + options.dynamic_shared;
  const auto axis = [&](Special x) { return static_cast<size_t>(special) - static_cast<size_t>(x); };
  switch (special) {
    case Special::TID_X:
      return thread % options.block[0];
    case Special::TID_Y:
      return thread / options.block[0] % options.block[1];
    case Special::TID_Z:
      return thread / options.block[0] / options.block[1];
    case Special::NTID_X:
    case Special::NTID_Y:
    case Special::NTID_Z:
      return options.block[axis(Special::NTID_X)];
    case Special::CTAID_X:
    case Special::CTAID_Y:
    case Special::CTAID_Z:
      return block.coordinates[axis(Special::CTAID_X)];
    case Special::NCTAID_X:
    case Special::NCTAID_Y:
    case Special::NCTAID_Z:
      return options.grid[axis(Special::NCTAID_X)];
    case Special::LANEID:
      return lane;
    case Special::WARPID:
      return warp;
    case Special::NWARPID:
      return static_cast<uint32_t>(block.warps.size());
    case Special::SMID:
      return block.number % MULTIPROCESSORS;
    case Special::NSMID:
      return MULTIPROCESSORS;
    case Special::GRIDID:
      return 0;
    case Special::LANEMASK_EQ:
      return 1u << lane;
    case Special::LANEMASK_LE:
      return (2u << lane) - 1;
    case Special::LANEMASK_LT:
      return (1u << lane) - 1;
    case Special::LANEMASK_GE:
      return ~((1u << lane) - 1);
    case Special::LANEMASK_GT:
      return ~((2u << lane) - 1);
    case Special::DYNAMIC_SMEM_SIZE:
      return options.dynamic_shared;
    case Special::TOTAL_SMEM_SIZE:
    case Special::AGGR_SMEM_SIZE:
      return shared;
    // A cluster is one block.
    case Special::CLUSTER_CTAID_X:
    case Special::CLUSTER_CTAID_Y:
    case Special::CLUSTER_CTAID_Z:
    case Special::CLUSTER_CTARANK:
      return 0;
    case Special::CLUSTER_NCTAID_X:
    case Special::CLUSTER_NCTAID_Y:
    case Special::CLUSTER_NCTAID_Z:
    case Special::CLUSTER_NCTARANK:
      return 1;
    case Special::CLUSTERID_X:
    case Special::CLUSTERID_Y:
    case Special::CLUSTERID_Z:
      return block.coordinates[axis(Special::CLUSTERID_X)];
    case Special::NCLUSTERID_X:
    case Special::NCLUSTERID_Y:
    case Special::NCLUSTERID_Z:
      return options.grid[axis(Special::NCLUSTERID_X)];
  }
  return 0;
}

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

}  // namespace

Launch::Launch(const Program& the_program, const LaunchOptions& the_options,
               const std::vector<uint64_t>& variable_addresses)
    : program(the_program), options(the_options), memory(Memory::instance()), findings(the_options.checks) {
  // What the machine itself relies on; the limits of devices are the business of runner.cpp.
  uint64_t threads = 1;
  blocks_ = 1;
  for (int i = 0; i < 3; ++i) {
    if (options.grid[i] == 0 || options.block[i] == 0) refuse("a launch needs at least one block of one thread");
    threads = std::min<uint64_t>(threads * options.block[i], uint64_t{1} << 32);
    blocks_ = std::min<uint64_t>(blocks_ * options.grid[i], uint64_t{1} << 32);
  }
  if (threads > LANES * LANES) refuse("a block has at most 1024 threads; got " + std::to_string(threads));
  if (blocks_ >= uint64_t{1} << 32) refuse("a grid has less than 2^32 blocks");
  if (options.arguments.size() != program.parameter_bytes) {
    refuse("the kernel has " + std::to_string(program.parameter_bytes) + " bytes of parameters; got " +
           std::to_string(options.arguments.size()));
  }
  if (options.threads == 0) refuse("a launch needs at least one worker thread");

  order = std::make_unique<BlockOrder>(checks(Check::RACE) ? blocks_ : 0);
  initial_registers.assign(program.register_bytes, 0);
  for (const Constant& constant : program.constants) {
    uint64_t bits = constant.bits;
    if (constant.variable >= 0) bits += variable_addresses.at(static_cast<size_t>(constant.variable));
    for (size_t lane = 0; lane < LANES; ++lane) {
      const size_t bytes = constant.wide ? 8 : 4;
      std::memcpy(initial_registers.data() + constant.slot + lane * bytes, &bits, bytes);
    }
  }
}

Launch::~Launch() = default;

void Launch::fill_specials(Warp& warp) const {
  for (const SpecialSlot& special : program.specials) {
    const auto value = [&](uint32_t lane) { return value_of(special.special, *warp.block, warp.index, lane); };
    if (special.wide) {
      fill<uint64_t>(warp, special.slot, value);
    } else {
      fill<uint32_t>(warp, special.slot, value);
    }
  }
}

void Launch::print(const std::string& text) {
  std::lock_guard lock(printing_);
  printed_ += text;
}

// The blocks of one thread.
class Launch::Worker {
 public:
  explicit Worker(Launch& launch) : launch_(launch) {}

  void run() {
    uint64_t turns = 0;  // slices used up by blocks that were not done, since `room` grew
    uint64_t room = 1;   // blocks that may be under way: doubled when each has had a turn
    while (!launch_.interrupted && !launch_.stopped) {
      std::unique_ptr<Block> block;
      if (waiting_.size() < std::min(room, most_)) block = next();
      if (!block && waiting_.empty()) return;
      if (!block) {
        block = std::move(waiting_.front());
        waiting_.pop_front();
      }
      if (run(*block)) {
        spare_.push_back(std::move(block));
        if (waiting_.empty()) room = 1, turns = 0;
        continue;
      }
      waiting_.push_back(std::move(block));
      if (++turns >= room) {
        room *= 2;
        turns = 0;
      }
    }
  }

  void add_to(LaunchResult& result) {
    for (std::unique_ptr<Block>& block : waiting_) spare_.push_back(std::move(block));
    waiting_.clear();
    for (const std::unique_ptr<Block>& block : spare_) {
      result.barriers += block->barriers_completed;
      result.instructions += block->instructions;
      for (size_t i = 0; i < block->counters.size(); ++i) {
        OperationCounters& sum = result.counters[i];
        const OperationCounters& more = block->counters[i];
        sum.warps += more.warps;
        sum.lanes += more.lanes;
        sum.diverged += more.diverged;
        sum.shared_waves += more.shared_waves;
        sum.shared_ideal += more.shared_ideal;
        sum.global_sectors += more.global_sectors;
        sum.global_ideal += more.global_ideal;
        sum.bytes += more.bytes;
      }
    }
  }

 private:
  // A new block, or null where all have been begun.
  std::unique_ptr<Block> next() {
    const uint64_t turn = launch_.next_block_.fetch_add(1);
    if (turn >= launch_.blocks_) return nullptr;
    std::unique_ptr<Block> block;
    if (spare_.empty()) {
      block = std::make_unique<Block>();
    } else {
      block = std::move(spare_.back());
      spare_.pop_back();
    }
    block->start(launch_, static_cast<uint32_t>(launch_.number_of(turn)));
    if (most_ == 1) {
      const uint64_t bytes = block->warps.size() * launch_.initial_registers.size() + block->local.size() +
                             block->local_initialized.size() + 5 * block->shared->bytes.size() + 4096;
      most_ = std::clamp(RESIDENT_BYTES / bytes, MIN_RESIDENT, MAX_RESIDENT);
    }
    return block;
  }

  // Whether the block is done.
  bool run(Block& block) {
    for (int slice = 0; slice < PATIENCE; ++slice) {
      const uint64_t before = block.barriers_completed;
      if (block.run(SLICE)) return true;
      if (launch_.interrupted || launch_.stopped || block.barriers_completed == before) return false;
    }
    return false;
  }

  Launch& launch_;
  std::deque<std::unique_ptr<Block>> waiting_;  // blocks set aside, the longest first
  std::vector<std::unique_ptr<Block>> spare_;   // blocks that are done, for their memory
  uint64_t most_ = 1;                           // blocks under way
};

// The block that is begun as the turn-th. RANDOM: a bijection of the block numbers, x -> a x + b mod the number of
// blocks with a coprime to it, over which blocks that are neighbours are far apart.
uint64_t Launch::number_of(uint64_t turn) const {
  if (options.order == Order::FORWARD) return turn;
  if (options.order == Order::REVERSE) return blocks_ - 1 - turn;
  uint64_t mixed = (options.seed + 0x9e3779b97f4a7c15) * 0xbf58476d1ce4e5b9;
  mixed ^= mixed >> 31;
  uint64_t factor = (mixed & 0x7fffffff) % blocks_;
  while (std::gcd(factor, blocks_) != 1) factor = (factor + 1) % blocks_;
  return (turn * factor + (mixed >> 32)) % blocks_;
}

LaunchResult Launch::run() {
  LaunchResult result;
  result.counters.resize(program.operations.size());
  const size_t count = static_cast<size_t>(std::min<uint64_t>(options.threads, blocks_));
  std::vector<std::unique_ptr<Worker>> workers;
  for (size_t i = 0; i < count; ++i) workers.push_back(std::make_unique<Worker>(*this));
  std::vector<std::exception_ptr> failures(count);
  const auto work = [&](size_t i) {
    try {
      workers[i]->run();
    } catch (...) {
      failures[i] = std::current_exception();
      stopped = true;
    }
  };
  {
    std::vector<std::jthread> threads;
    for (size_t i = 1; i < count; ++i) {
      try {
        threads.emplace_back(work, i);
      } catch (const std::system_error&) {
        break;  // as many as there can be
      }
    }
    work(0);
  }
  for (const std::exception_ptr& failure : failures) {
    if (failure) std::rethrow_exception(failure);
  }
  for (const std::unique_ptr<Worker>& worker : workers) worker->add_to(result);
  result.findings = findings.take();
  result.printed = std::move(printed_);
  return result;
}

}  // namespace sparse24::ptx
