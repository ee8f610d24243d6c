// A module as its users hold it: the tree, its decoded kernels, and its .global and .const variables in memory. All of
// them are made when first asked for; any thread may ask.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "csrc/ptx/program.h"
#include "csrc/ptx/syntax.h"

namespace sparse24::ptx {

class LoadedModule {
 public:
  explicit LoadedModule(std::string_view text) : tree_(parse(text)), variables_(tree_->variables.size()) {}
  ~LoadedModule();
  LoadedModule(const LoadedModule&) = delete;

  const Module& tree() const { return *tree_; }
  // Throws std::invalid_argument where there is no such kernel, SyntaxError or Unsupported where it cannot be decoded.
  const Program& program(std::string_view kernel);
  const std::string& description();
  const std::string& kernel_description(std::string_view kernel);
  // The bytes of a variable; null where there is none of that name.
  void* variable(std::string_view name, size_t& size);
  // The addresses of the variables that the program names, by index in Module::variables; 0 for the others.
  std::vector<uint64_t> addresses(const Program& program);

 private:
  struct Storage {
    std::unique_ptr<uint8_t, void (*)(void*)> bytes{nullptr, nullptr};
    uint64_t size = 0, address = 0;
  };
  const Function& kernel(std::string_view name) const;
  Storage& storage(size_t variable);  // under the mutex, as initialize
  void initialize(size_t variable);

  std::unique_ptr<const Module> tree_;
  std::mutex mutex_;
  std::map<std::string, std::unique_ptr<const Program>, std::less<>> programs_;
  std::map<std::string, std::string, std::less<>> kernel_descriptions_;
  std::string description_;
  std::vector<Storage> variables_;
};

}  // namespace sparse24::ptx
