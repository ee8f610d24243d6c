// What api.h tells as JSON, and findings in words.
#pragma once
#include <cstdint>
#include <string>

#include "csrc/ptx/api.h"
#include "csrc/ptx/machine.h"
#include "csrc/ptx/program.h"
#include "csrc/ptx/syntax.h"

namespace sparse24::ptx {

uint64_t size_of(const Variable& variable);  // bytes; of [] as many as its initialiser has

std::string describe(const Module& module);
// `program` null: it could not be decoded, and `error` says why.
std::string describe(const Module& module, const Function& kernel, const Program* program, const std::string& error);
std::string describe(const Module& module, const Program& program, const sparse24_ptx_launch& launch,
                     const LaunchResult& result);
// The first of them in words, one a line, as sparse24/ptx_report.py words them.
std::string describe(const Module& module, const Program& program, const std::vector<Finding>& findings);

}  // namespace sparse24::ptx
