// Launches on libsparse24ptx.so. Shared memory, multiprocessors: CUDA C++ Programming Guide, "Compute Capabilities",
// and the vendor's data of one device each: A100, RTX 3090 Ti, AGX Orin, L40S, H100 SXM, B200, RTX PRO 6000.
#include "csrc/cuda/emulator.h"

#include <algorithm>
#include <bit>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "csrc/cuda/image.h"

namespace sparse24::cuda {

namespace {

constexpr uint32_t NUMERICS_SM_80 = 1, NUMERICS_SM_90 = 2;
constexpr unsigned KB = 1024;
constexpr EmulatedArch ARCHS[] = {
    {"sm_80", {80, 108, 163 * KB}, NUMERICS_SM_80},   {"sm_86", {86, 84, 99 * KB}, NUMERICS_SM_80},
    {"sm_87", {87, 16, 163 * KB}, NUMERICS_SM_80},    {"sm_89", {89, 142, 99 * KB}, NUMERICS_SM_80},
    {"sm_90", {90, 132, 227 * KB}, NUMERICS_SM_90},   {"sm_90a", {90, 132, 227 * KB}, NUMERICS_SM_90},
    {"sm_100", {100, 148, 227 * KB}, NUMERICS_SM_90}, {"sm_100f", {100, 148, 227 * KB}, NUMERICS_SM_90},
    {"sm_120", {120, 188, 99 * KB}, NUMERICS_SM_90},  {"sm_120f", {120, 188, 99 * KB}, NUMERICS_SM_90},
};
constexpr int MAX_ALIGN_BITS = 4;  // 16 bytes, the widest access of a thread

// The shipped text, read once in a process.
Ptx shipped(const Module& module) {
  static std::mutex mutex;
  static std::map<const char*, Ptx> read;
  const std::lock_guard lock(mutex);
  Ptx& ptx = read[module.ptx];
  if (!ptx) ptx = load_ptx(module.name, module.ptx);
  return ptx;
}

bool overlap(const Range& a, const Range& b) {
  const auto a_data = reinterpret_cast<uintptr_t>(a.data), b_data = reinterpret_cast<uintptr_t>(b.data);
  return a_data < b_data + b.bytes && b_data < a_data + a.bytes;
}

// A range at an emulated address, until the launch is over.
class Buffer {
 public:
  Buffer(const Range& range, bool known) {
    if (!known && range.bytes > 0) std::memset(range.data, 0xff, range.bytes);
    const int aligned = std::min(std::countr_zero(reinterpret_cast<uintptr_t>(range.data)), MAX_ALIGN_BITS);
    address_ = sparse24_ptx_allocate(range.data, range.bytes, 1u << aligned, known);
    if (address_ == 0) {
      throw std::runtime_error(std::string("the emulator has no room for a launch's buffers: ") + sparse24_ptx_error());
    }
  }
  Buffer(Buffer&& other) noexcept : address_(std::exchange(other.address_, 0)) {}
  ~Buffer() {
    if (address_ != 0) sparse24_ptx_free(address_);
  }
  uint64_t address() const { return address_; }

 private:
  uint64_t address_;
};

// Places all ranges and writes their addresses into the arguments.
std::vector<Buffer> place(const std::vector<Range>& ranges, std::byte* arguments) {
  std::vector<Buffer> buffers;
  std::map<std::pair<void*, uint64_t>, uint64_t> addresses;  // of each run of bytes
  for (const Range& range : ranges) {
    uint64_t& address = addresses[{range.data, range.bytes}];
    if (address == 0) {
      const bool known = std::ranges::any_of(
          ranges, [&](const Range& other) { return other.initialized && (&other == &range || overlap(other, range)); });
      address = buffers.emplace_back(range, known).address();
    }
    std::memcpy(arguments + range.offset, &address, sizeof address);
  }
  return buffers;
}

}  // namespace

Ptx load_ptx(std::string_view name, std::string_view text) {
  Ptx ptx(sparse24_ptx_load(text.data(), text.size()), sparse24_ptx_unload);
  if (!ptx) throw std::runtime_error("the PTX of '" + std::string(name) + "': " + sparse24_ptx_error());
  return ptx;
}

const EmulatedArch* find_arch(std::string_view name) {
  const auto arch = std::ranges::find(ARCHS, name, &EmulatedArch::name);
  return arch != std::end(ARCHS) ? arch : nullptr;
}

std::string arch_names() {
  std::string names;
  for (const EmulatedArch& arch : ARCHS) (names += names.empty() ? "" : ", ") += arch.name;
  return names;
}

void EmulatedMachine::run(const Launch& launch) const {
  const std::string where = std::string("kernel '") + launch.kernel + "' on an emulated " + options_.arch;
  if (options_.interrupted && options_.interrupted(options_.context)) throw std::runtime_error(where + ": interrupted");
  const auto own = options_.modules.find(std::string_view(launch.module->name));
  const bool ships = own == options_.modules.end();
  const Ptx ptx = ships ? shipped(*launch.module) : own->second;
  const Image* const image = ships ? choose_image(*launch.module, options_.device.sm) : nullptr;
  check_launch(launch, options_.device, image ? resources_of(*image, launch.kernel) : Resources{});
  auto arguments = launch.arguments;
  const std::vector<Buffer> buffers = place(launch.ranges, arguments.data());

  sparse24_ptx_launch call{};
  const auto extents = [](uint32_t (&to)[3], const Extent& from) { to[0] = from.x, to[1] = from.y, to[2] = from.z; };
  extents(call.grid, launch.grid);
  extents(call.block, launch.block);
  call.arguments = arguments.data();
  call.argument_bytes = launch.argument_bytes;
  call.dynamic_shared = launch.shared_bytes;
  call.shared_limit = options_.device.shared_bytes_per_block;
  call.checks = options_.checks;
  call.counters = options_.counters;
  call.numerics = options_.numerics;
  call.order = options_.order;
  call.seed = options_.seed;
  call.threads = options_.threads;
  call.interrupted = options_.interrupted;
  call.context = options_.context;

  const std::unique_ptr<sparse24_ptx_report, void (*)(sparse24_ptx_report*)> report(
      sparse24_ptx_run(ptx.get(), launch.kernel, &call), sparse24_ptx_discard);
  if (!report) throw std::runtime_error(where + ": " + sparse24_ptx_error());
  reports_.push_back(std::string("{\"kernel\":\"") + launch.kernel +
                     "\",\"report\":" + sparse24_ptx_report_json(report.get()) + "}");
  if (const size_t findings = sparse24_ptx_finding_count(report.get()); findings > 0) {
    throw std::runtime_error(where + ": " + std::to_string(findings) + (findings == 1 ? " finding\n" : " findings\n") +
                             sparse24_ptx_report_text(report.get()));
  }
}

}  // namespace sparse24::cuda
