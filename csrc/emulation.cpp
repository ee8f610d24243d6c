// The operators behind sparse24/emulation.py, which has the types and checks that users see, and Ctrl-C.
//
// Ctrl-C. An operator runs without Python, and torch turns whatever it throws into RuntimeError. So a launch that
// Ctrl-C has stopped raises that, the emulation remembers it, and emulate() sends the signal again when it is left:
// Python's handler then raises KeyboardInterrupt. Python's own functions are found by name where the process has them;
// in a process without Python, and in threads other than the main one, which get no signals, a launch runs to its end.
#include "csrc/emulation.h"

#include <dlfcn.h>
#include <sys/syscall.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <type_traits>
#include <utility>

#include "csrc/arguments.h"

namespace sparse24 {

namespace {

// Innermost last. The identity of each is its number: generators may leave theirs in any order.
thread_local std::vector<std::pair<int64_t, std::unique_ptr<Emulation>>> emulations;

auto find(int64_t id) {
  const auto found = std::ranges::find(emulations, id, &decltype(emulations)::value_type::first);
  REQUIRE(found != emulations.end(), "an emulation must be left in the thread that entered it");
  return found;
}

// Whether SIGINT has come since the last time that somebody asked.
bool sigint_came() {
  struct Python {
    int (*ensure)() = nullptr;
    void (*release)(int) = nullptr;
    int (*interrupt_occurred)() = nullptr;
  };
  static const Python python = [] {
    Python found;
    const auto find = [](auto& entry, const char* name) {
      entry = reinterpret_cast<std::remove_reference_t<decltype(entry)>>(dlsym(RTLD_DEFAULT, name));
    };
    find(found.ensure, "PyGILState_Ensure");
    find(found.release, "PyGILState_Release");
    find(found.interrupt_occurred, "PyOS_InterruptOccurred");
    return found;
  }();
  if (!python.ensure || !python.release || !python.interrupt_occurred || syscall(SYS_gettid) != getpid()) return false;
  const int state = python.ensure();  // whether torch has let go of the GIL or not
  const bool came = python.interrupt_occurred() != 0;
  python.release(state);
  return came;
}

int poll(void* context) {
  bool& interrupted = static_cast<Emulation*>(context)->interrupted;
  interrupted = interrupted || sigint_came();
  return interrupted;
}

int64_t emulation_push(std::string arch_name, int64_t checks, bool counters, int64_t numerics, int64_t order,
                       int64_t seed, int64_t threads, int64_t multiprocessors, std::string linear_kernel,
                       int64_t splits) {
  static std::atomic<int64_t> last_id;
  const cuda::EmulatedArch* arch = cuda::find_arch(arch_name);
  REQUIRE(arch != nullptr, "arch must be one of ", cuda::arch_names(), "; got '", arch_name, "'");
  auto emulation = std::make_unique<Emulation>();
  cuda::EmulatorOptions& options = emulation->options;
  options.arch = arch->name;
  options.device = arch->device;
  if (multiprocessors > 0) options.device.multiprocessors = static_cast<int>(multiprocessors);
  options.checks = static_cast<uint32_t>(checks);
  options.counters = counters;
  options.numerics = numerics < 0 ? arch->numerics : static_cast<uint32_t>(numerics);
  options.order = static_cast<uint32_t>(order);
  options.seed = static_cast<uint64_t>(seed);
  options.threads = static_cast<uint32_t>(threads);
  options.interrupted = poll;
  options.context = emulation.get();
  emulation->linear_kernel = std::move(linear_kernel);
  emulation->splits = static_cast<int>(splits);
  emulations.emplace_back(++last_id, std::move(emulation));
  return emulations.back().first;
}

void emulation_replace(int64_t id, std::string module, std::string ptx) {
  std::string names;
  bool known = false;
  for (const cuda::Module* shipped : cuda::modules()) {
    names += std::string(names.empty() ? "" : ", ") + shipped->name;
    known = known || module == shipped->name;
  }
  REQUIRE(known, "modules must be named ", names, "; got '", module, "'");
  find(id)->second->options.modules[module] = cuda::load_ptx(module, ptx);
}

std::string emulation_take_reports(int64_t id) {
  std::string text = "[";
  for (const std::string& report : std::exchange(find(id)->second->reports, {})) {
    (text += text.size() > 1 ? "," : "") += report;
  }
  return text + "]";
}

bool emulation_pop(int64_t id) {
  const auto found = find(id);
  const bool interrupted = found->second->interrupted;
  emulations.erase(found);
  return interrupted;
}

}  // namespace

const Emulation* current_emulation() { return emulations.empty() ? nullptr : emulations.back().second.get(); }

STABLE_TORCH_LIBRARY_FRAGMENT(sparse24, m) {
  // Negative numerics, no multiprocessors: as the arch has them. "" and 0: as the plan has it.
  m.def(
      "emulation_push(str arch, int checks, bool counters, int numerics, int order, int seed, int threads, "
      "int multiprocessors, str linear_kernel, int splits) -> int");
  m.def("emulation_replace(int id, str module, str ptx) -> ()");  // of the shipped module of that name
  m.def("emulation_take_reports(int id) -> str");                 // since the last time: a JSON array
  m.def("emulation_pop(int id) -> bool");                         // whether Ctrl-C has stopped a launch
}

STABLE_TORCH_LIBRARY_IMPL(sparse24, CompositeExplicitAutograd, m) {
  m.impl("emulation_push", TORCH_BOX(&emulation_push));
  m.impl("emulation_replace", TORCH_BOX(&emulation_replace));
  m.impl("emulation_take_reports", TORCH_BOX(&emulation_take_reports));
  m.impl("emulation_pop", TORCH_BOX(&emulation_pop));
}

}  // namespace sparse24
