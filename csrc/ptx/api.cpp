// The C interface (api.h): owns the objects behind its handles and keeps every exception on this side of it.
#include "csrc/ptx/api.h"

#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>

#include "csrc/ptx/describe.h"
#include "csrc/ptx/isa.h"
#include "csrc/ptx/loaded_module.h"
#include "csrc/ptx/memory.h"
#include "csrc/ptx/runner.h"
#include "csrc/ptx/tensor/arithmetic.h"

using namespace sparse24::ptx;

struct sparse24_ptx_module {
  explicit sparse24_ptx_module(std::string_view text) : loaded(text) {}
  LoadedModule loaded;
};

struct sparse24_ptx_report {
  size_t findings;
  std::string json, text;
};

namespace {

struct LastError {
  std::string message;
  int kind = SPARSE24_PTX_OK;
  Place place;
};
thread_local LastError last_error;

void fail(int kind, const char* message, Place place = {}) noexcept {
  last_error.kind = kind;
  last_error.place = place;
  try {
    last_error.message = message;
  } catch (...) {
    last_error.message.clear();  // out of memory: the kind says it
  }
}

// What `body` returns, or `failure` with the error kept for sparse24_ptx_error().
template <class Result, class Body>
Result guarded(Result failure, Body&& body) noexcept {
  last_error.kind = SPARSE24_PTX_OK;
  last_error.message.clear();
  try {
    return body();
  } catch (const SyntaxError& error) {
    fail(SPARSE24_PTX_TEXT, error.what(), error.place);
  } catch (const Interrupted& error) {
    fail(SPARSE24_PTX_INTERRUPTED, error.what());
  } catch (const std::bad_alloc&) {
    fail(SPARSE24_PTX_RESOURCES, "out of memory");
  } catch (const std::length_error& error) {
    fail(SPARSE24_PTX_RESOURCES, error.what());
  } catch (const std::system_error& error) {  // threads
    fail(SPARSE24_PTX_RESOURCES, error.what());
  } catch (const std::exception& error) {
    fail(SPARSE24_PTX_ARGUMENT, error.what());
  } catch (...) {
    fail(SPARSE24_PTX_RESOURCES, "unknown exception");
  }
  return failure;
}

}  // namespace

sparse24_ptx_module* sparse24_ptx_load(const char* text, size_t size) {
  return guarded<sparse24_ptx_module*>(nullptr, [&] { return new sparse24_ptx_module({text, size}); });
}

void sparse24_ptx_unload(sparse24_ptx_module* module) { delete module; }

const char* sparse24_ptx_describe(sparse24_ptx_module* module) {
  return guarded<const char*>(nullptr, [&] { return module->loaded.description().c_str(); });
}

const char* sparse24_ptx_describe_kernel(sparse24_ptx_module* module, const char* name) {
  return guarded<const char*>(nullptr, [&] { return module->loaded.kernel_description(name).c_str(); });
}

int sparse24_ptx_decode(sparse24_ptx_module* module, const char* kernel) {
  return guarded(1, [&] { return module->loaded.program(kernel), 0; });
}

void* sparse24_ptx_variable(sparse24_ptx_module* module, const char* name, size_t* size) {
  return guarded<void*>(nullptr, [&]() -> void* { return module->loaded.variable(name, *size); });
}

uint64_t sparse24_ptx_allocate(void* host, uint64_t size, uint32_t align, int initialized) {
  return guarded<uint64_t>(0, [&] { return Memory::instance().allocate(host, size, align, initialized != 0); });
}

void sparse24_ptx_free(uint64_t address) {
  guarded(0, [&] { return Memory::instance().free(address), 0; });
}

sparse24_ptx_report* sparse24_ptx_run(sparse24_ptx_module* module, const char* kernel,
                                      const sparse24_ptx_launch* launch) {
  return guarded<sparse24_ptx_report*>(nullptr, [&] {
    const Program& program = module->loaded.program(kernel);
    const LaunchResult result = run(module->loaded, program, *launch);
    const Module& tree = module->loaded.tree();
    return new sparse24_ptx_report{result.findings.size(), describe(tree, program, *launch, result),
                                   describe(tree, program, result.findings)};
  });
}

size_t sparse24_ptx_finding_count(const sparse24_ptx_report* report) { return report->findings; }
const char* sparse24_ptx_report_json(sparse24_ptx_report* report) { return report->json.c_str(); }
const char* sparse24_ptx_report_text(sparse24_ptx_report* report) { return report->text.c_str(); }
void sparse24_ptx_discard(sparse24_ptx_report* report) { delete report; }

const char* sparse24_ptx_instructions() {
  return guarded<const char*>("", [] {
    static const std::string table = supported_instructions();
    return table.c_str();
  });
}

const char* sparse24_ptx_isa(const char* force) {
  return guarded<const char*>(nullptr, [&] {
    if (force != nullptr && !tensor::force_arithmetic(force)) {
      throw std::invalid_argument("'" + std::string(force) + "' is not \"avx512\" or \"portable\", or not of this CPU");
    }
    return tensor::arithmetic().name;
  });
}

const char* sparse24_ptx_error() { return last_error.message.c_str(); }

int sparse24_ptx_error_kind(uint32_t* line, uint32_t* column) {
  if (line != nullptr) *line = last_error.place.line;
  if (column != nullptr) *column = last_error.place.column;
  return last_error.kind;
}
