// The launch behind sparse24_ptx_run. Limits: CUDA C++ Programming Guide, "Compute Capabilities".
#include "csrc/ptx/runner.h"

#include <sched.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <string>
#include <thread>

namespace sparse24::ptx {
namespace {

constexpr uint32_t MAX_GRID[3] = {0x7fffffff, 65535, 65535};
constexpr uint32_t MAX_BLOCK[3] = {1024, 1024, 64};
constexpr uint32_t MAX_BLOCK_THREADS = 1024;
constexpr uint32_t MAX_WORKERS = 256;
constexpr auto POLL = std::chrono::milliseconds(20);

// Shared memory a block can have, by opt-in: 1 KB less than the multiprocessor's on sm_80 and newer.
uint32_t shared_limit(std::string_view target) {
  int architecture = 0;
  if (target.starts_with("sm_")) std::from_chars(target.data() + 3, target.data() + target.size(), architecture);
  uint32_t kilobytes = 227;  // sm_90, sm_100 to sm_110
  if (architecture < 70) {
    kilobytes = 48;
  } else if (architecture < 75) {
    kilobytes = 96;
  } else if (architecture < 80) {
    kilobytes = 64;
  } else if (architecture == 80 || architecture == 87) {
    kilobytes = 163;
  } else if (architecture < 90 || architecture >= 120) {
    kilobytes = 99;
  }
  return kilobytes * 1024;
}

std::string shape(const uint32_t (&extent)[3]) {
  return std::string("(") + std::to_string(extent[0]) + ", " + std::to_string(extent[1]) + ", " +
         std::to_string(extent[2]) + ")";
}

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

void check_limits(const Module& module, const Program& program, const sparse24_ptx_launch& launch) {
  uint64_t blocks = 1, threads = 1;
  for (int i = 0; i < 3; ++i) {
    const std::string axis(1, "xyz"[i]);
    if (launch.grid[i] == 0 || launch.grid[i] > MAX_GRID[i]) {
      refuse("grid is " + shape(launch.grid) + ": " + axis + " must be 1 to " + std::to_string(MAX_GRID[i]));
    }
    if (launch.block[i] == 0 || launch.block[i] > MAX_BLOCK[i]) {
      refuse("block is " + shape(launch.block) + ": " + axis + " must be 1 to " + std::to_string(MAX_BLOCK[i]));
    }
    blocks = std::min<uint64_t>(blocks * launch.grid[i], uint64_t{1} << 32);
    threads *= launch.block[i];
  }
  if (blocks >= uint64_t{1} << 32) refuse("grid is " + shape(launch.grid) + ": 2^32 blocks or more are not supported");
  if (threads > MAX_BLOCK_THREADS) {
    refuse("block is " + shape(launch.block) + ": " + std::to_string(threads) +
           " threads; at most 1024 fit in a block");
  }
  const auto& required = program.required_threads;
  const auto& most = program.max_threads;
  const auto extent = [](uint32_t value) { return std::max(value, 1u); };
  if (required[0] != 0) {
    for (int i = 0; i < 3; ++i) {
      if (launch.block[i] != extent(required[i])) {
        refuse("block is " + shape(launch.block) + ", but the kernel is compiled for .reqntid " + shape(required));
      }
    }
  }
  if (most[0] != 0 && threads > uint64_t{extent(most[0])} * extent(most[1]) * extent(most[2])) {
    refuse("block is " + shape(launch.block) + ": " + std::to_string(threads) +
           " threads, more than the kernel's .maxntid " + shape(most));
  }
  const uint64_t shared = uint64_t{program.dynamic_offset} + launch.dynamic_shared;
  const uint32_t limit = launch.shared_limit != 0 ? launch.shared_limit : shared_limit(module.target);
  if (shared > limit) {
    refuse("a block needs " + std::to_string(shared) + " bytes of shared memory (" +
           std::to_string(program.shared_bytes) + " static, " + std::to_string(launch.dynamic_shared) + " dynamic), " +
           (launch.shared_limit != 0 ? "its device" : std::string(module.target)) + " has " + std::to_string(limit));
  }
  if (launch.argument_bytes != program.parameter_bytes) {
    refuse("arguments are " + std::to_string(launch.argument_bytes) + " bytes, the kernel's parameters " +
           std::to_string(program.parameter_bytes));
  }
  if (launch.numerics > static_cast<uint32_t>(Numerics::FLOAT64)) refuse("numerics is not 0 to 3");
  if (launch.order > static_cast<uint32_t>(Order::RANDOM)) refuse("order is not 0 to 2");
  if ((launch.checks & ~static_cast<uint32_t>(Check::ALL)) != 0) refuse("checks has bits beyond 63");
}

uint32_t cores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(CPU_COUNT(&set), 1);
  return std::max(std::thread::hardware_concurrency(), 1u);
}

}  // namespace

LaunchResult run(LoadedModule& module, const Program& program, const sparse24_ptx_launch& launch) {
  check_limits(module.tree(), program, launch);
  LaunchOptions options;
  std::copy_n(launch.grid, 3, options.grid);
  std::copy_n(launch.block, 3, options.block);
  const auto* arguments = static_cast<const uint8_t*>(launch.arguments);
  options.arguments.assign(arguments, arguments + launch.argument_bytes);
  options.dynamic_shared = launch.dynamic_shared;
  options.checks = launch.checks;
  options.counters = launch.counters != 0;
  options.numerics = static_cast<Numerics>(launch.numerics);
  options.sparse_products = launch.sparse_products;
  options.order = static_cast<Order>(launch.order);
  options.seed = launch.seed;
  options.threads = std::min(launch.threads != 0 ? launch.threads : cores(), MAX_WORKERS);
  if (launch.budget != 0) options.budget = launch.budget;

  const std::vector<uint64_t> addresses = module.addresses(program);
  Launch machine(program, options, addresses);
  if (launch.interrupted == nullptr) return machine.run();

  // The machine runs in a thread of its own while this one asks whether to stop.
  LaunchResult result;
  std::exception_ptr failure;
  std::mutex mutex;
  std::condition_variable finished;
  bool done = false;
  std::thread worker([&] {
    try {
      result = machine.run();
    } catch (...) {
      failure = std::current_exception();
    }
    std::lock_guard lock(mutex);
    done = true;
    finished.notify_one();
  });
  for (std::unique_lock lock(mutex); !finished.wait_for(lock, POLL, [&] { return done; });) {
    lock.unlock();
    if (!machine.interrupted && launch.interrupted(launch.context) != 0) machine.interrupted = true;
    lock.lock();
  }
  worker.join();
  if (failure) std::rethrow_exception(failure);
  if (machine.interrupted) throw Interrupted("the launch was interrupted");
  return result;
}

}  // namespace sparse24::ptx
