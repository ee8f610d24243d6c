#include "csrc/cpu/linear/linear_choice.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string_view>
#include <tuple>

#include "csrc/cpu/isa.h"
#include "csrc/cpu/linear/linear_kernels.h"
#include "csrc/cpu/parallel.h"

namespace sparse24::cpu {
namespace {

// ---- The rules ----

enum class Machine { ZEN, AVX512, AMX, AVX2, NEON, PORTABLE };

Machine machine_of(const Cpu& cpu) {
#if defined(__x86_64__)
  if (cpu.isa >= Isa::AVX512) {
    return cpu.isa == Isa::AMX ? Machine::AMX : cpu.vendor == Vendor::AMD ? Machine::ZEN : Machine::AVX512;
  }
  return cpu.isa == Isa::AVX2 ? Machine::AVX2 : Machine::PORTABLE;
#else
  return cpu.isa == Isa::PORTABLE ? Machine::PORTABLE : Machine::NEON;
#endif
}

// Sets of kinds of weight.
enum Kinds : unsigned {
  F32 = 1,
  F16 = 2,
  BF16 = 4,
  BF16_FLOAT = 8,  // BF16 weights, x of another type
  I8 = 16,         // I8 and I4 with x rounded to int8
  I4 = 32,
  INT_FLOAT = 64,  // I8 and I4 that are multiplied by x as it is
  INT_BF16 = 128,  // the same, x being BF16
  INT = I8 | I4,
  ALL = 255,
};

Kinds kind_of(const LinearProduct& product) {
  if (product.weight_only && is_integer(product.weight)) {
    return product.x_element == Element::BF16 ? INT_BF16 : INT_FLOAT;
  }
  switch (product.weight) {
    case Element::F32:
      return F32;
    case Element::F16:
      return F16;
    case Element::BF16:
      return product.x_element == Element::BF16 ? BF16 : BF16_FLOAT;
    default:
      return product.weight == Element::I8 ? I8 : I4;
  }
}

enum class Path { SPARSE, MANY, DENSE };  // the best general kernels of the ISA, those for many tokens, aten's mm

struct Rule {
  Machine machine;
  unsigned kinds;
  int64_t min_tokens, max_tokens, min_out_features, min_in_features;
  Path path;
  const char* reason;
};

constexpr int64_t ANY = std::numeric_limits<int64_t>::max();

// The first that fits decides. "Predicted" is arithmetic on the ports of the CPU.
constexpr Rule RULES[] = {
    // machine       weights    tokens    N >= K >= path
    {Machine::ZEN, F32 | F16, 64, ANY, 384, 128, Path::MANY,
     "many tokens of a float weight: no permute for each multiplication (measured on Zen 4)"},
    {Machine::ZEN, ALL, 1, ANY, 1, 1, Path::SPARSE, "faster than dense at any number of tokens (measured on Zen 4)"},

    {Machine::AMX, BF16 | BF16_FLOAT | INT_BF16, 6, ANY, 1, 1, Path::MANY,
     "bfloat16 tiles, of a weight that is read compressed (measured on an Intel Xeon with AMX)"},
    {Machine::AMX, I4, 8, ANY, 1, 1, Path::MANY,
     "int8 tiles, of a weight that is read compressed (measured on an Intel Xeon with AMX)"},
    {Machine::AMX, I8, 16, ANY, 1, 1, Path::MANY,
     "int8 tiles, of a weight that is read compressed (measured on an Intel Xeon with AMX)"},
    {Machine::AMX, F32 | F16, 48, ANY, 384, 128, Path::MANY,
     "many tokens of a float weight: no permute for each multiplication (measured on an Intel Xeon with AMX)"},
    {Machine::AMX, ALL, 1, ANY, 1, 1, Path::SPARSE, "faster than dense (measured on an Intel Xeon with AMX)"},

    {Machine::AVX512, F32 | F16, 48, ANY, 384, 128, Path::MANY,
     "many tokens of a float weight: no permute for each multiplication (measured on an Intel Xeon, its AMX unused)"},
    {Machine::AVX512, ALL, 1, ANY, 1, 1, Path::SPARSE, "faster than dense (measured on an Intel Xeon, its AMX unused)"},

    {Machine::AVX2, ALL, 1, ANY, 1, 1, Path::SPARSE,
     "faster than dense at any number of tokens (measured on Zen 4, with AVX2 alone)"},
    {Machine::NEON, ALL, 1, ANY, 1, 1, Path::SPARSE, "half the multiplications (predicted, not measured)"},

    {Machine::PORTABLE, INT, 1, 1, 1, 1, Path::SPARSE, "one token: decompressing takes as long (measured)"},
    {Machine::PORTABLE, ALL, 1, ANY, 1, 1, Path::DENSE, "torch's dense product has vector instructions (measured)"},
};

// Where strips of 16 rows of x are filled up by more than this, what gather gains is lost again (measured).
bool strips_are_full(Machine machine, Kinds kind, int64_t tokens) {
  if (!(kind & (F32 | F16))) return true;
  const int64_t filling_percent = machine != Machine::ZEN ? 10 : kind == F16 ? 7 : 3;
  return (tokens + 15) / 16 * 16 * 100 <= tokens * (100 + filling_percent);
}

bool fits(const Rule& rule, Machine machine, Kinds kind, const LinearProduct& product) {
  return rule.machine == machine && (rule.kinds & kind) && product.tokens >= rule.min_tokens &&
         product.tokens <= rule.max_tokens && product.out_features >= rule.min_out_features &&
         product.in_features >= rule.min_in_features &&
         (rule.path != Path::MANY || strips_are_full(machine, kind, product.tokens));
}

constexpr Rule NOTHING_TO_CHOOSE{Machine::PORTABLE, ALL, 0, ANY, 0, 0, Path::SPARSE, "an empty product"};

const Rule& rule_for(const Cpu& cpu, const LinearProduct& product) {
  const Machine machine = machine_of(cpu);
  const Kinds kind = kind_of(product);
  for (const Rule& rule : RULES) {
    if (fits(rule, machine, kind, product)) return rule;
  }
  return NOTHING_TO_CHOOSE;
}

// ---- The kernels there are ----

// Those of `isa`, best first, null where it has none; the general ones, and those for many tokens alone.
struct Candidates {
  std::array<const Kernels*, 5> kernels{};

  Candidates(Isa isa, Element weight, bool weight_only, Element x_element) {
    [[maybe_unused]] int count = 0;
#if defined(__x86_64__)
    if (isa >= Isa::AVX512_BF16) kernels[count++] = avx512_bf16_kernels(weight, weight_only, x_element);
    if (isa >= Isa::AVX512) {
      kernels[count++] = avx512_kernels(weight, weight_only, x_element);
      many = avx512_gather_kernels(weight, weight_only, x_element);
    }
    if (isa >= Isa::AMX && !many) many = amx_kernels(weight, weight_only, x_element);
    if (isa >= Isa::AVX2) kernels[count++] = avx2_kernels(weight, weight_only, x_element);
#elif defined(__aarch64__)
    if (isa >= Isa::NEON) kernels[count++] = neon_kernels(weight, weight_only, x_element);
#endif
    kernels[count] = portable_kernels(weight, weight_only, x_element);
  }

  const Kernels* many = nullptr;

  const Kernels& best() const {
    for (const Kernels* candidate : kernels) {
      if (candidate) return *candidate;
    }
    __builtin_unreachable();  // portable_kernels() is never null
  }
  const Kernels* find(std::string_view name) const {
    if (many && many->name == name) return many;
    for (const Kernels* candidate : kernels) {
      if (candidate && candidate->name == name) return candidate;
    }
    return nullptr;
  }
};

constexpr const char* DENSE = "dense";

// ---- What was measured ----

struct Entry {
  std::tuple<Element, bool, Element, int64_t, int64_t, Isa, int> key;  // all but the tokens
  int64_t tokens;
  const char* kernels;
  std::string reason;

  bool operator<(const Entry& other) const { return std::tie(key, tokens) < std::tie(other.key, other.tokens); }
};
using Table = std::vector<Entry>;

std::atomic<const Table*> tuned_table = nullptr;

Entry entry_of(const LinearProduct& product, Isa isa, int threads) {
  return {
      {product.weight, product.weight_only, product.x_element, product.out_features, product.in_features, isa, threads},
      product.tokens,
      nullptr,
      {}};
}

const Entry* find_tuned(const LinearProduct& product) {
  const Table* const table = tuned_table.load(std::memory_order_acquire);
  if (!table) return nullptr;
  const Entry wanted = entry_of(product, active_isa(), thread_count());
  const auto above = std::lower_bound(table->begin(), table->end(), wanted);
  if (above == table->end() || above->key != wanted.key) return nullptr;
  if (above->tokens == product.tokens) return &*above;
  if (above == table->begin()) return nullptr;
  const auto below = above - 1;
  return below->key == wanted.key && below->kernels == above->kernels ? &*below : nullptr;
}

// ---- What is forced ----

constexpr const char* NAMES[] = {"", DENSE, "perm", "gather", "amx", "portable"};

thread_local const char* forced = NAMES[0];

const char* known(std::string_view name) {
  for (const char* candidate : NAMES) {
    if (candidate == name) return candidate;
  }
  return nullptr;
}

// The kernels of a product and why; no kernels: dense.
struct Decision {
  const Kernels* kernels;
  const char* reason;
};

Decision decide(const Cpu& cpu, const Candidates& candidates, const LinearProduct& product) {
  const Rule& rule = rule_for(cpu, product);
  if (rule.path == Path::DENSE) return {nullptr, rule.reason};
  return {rule.path == Path::MANY && candidates.many ? candidates.many : &candidates.best(), rule.reason};
}

Decision decide(const Candidates& candidates, const LinearProduct& product) {
  if (*forced) {
    const Kernels* const kernels = candidates.find(forced);
    if (!kernels && forced != DENSE) {
      throw std::runtime_error(std::string("the kernels '") + forced + "' that force_cpu_kernels() asks for do not " +
                               "exist for these element types on this instruction set");
    }
    return {kernels, "forced by force_cpu_kernels()"};
  }
  if (const Entry* entry = find_tuned(product)) return {candidates.find(entry->kernels), entry->reason.c_str()};
  return decide(this_cpu(), candidates, product);
}

Choice choice_of(const Decision& decision) {
  return {decision.kernels ? decision.kernels->name : DENSE, decision.reason};
}

}  // namespace

Choice choose_by_rules(const Cpu& cpu, const LinearProduct& product) {
  return choice_of(decide(cpu, {cpu.isa, product.weight, product.weight_only, product.x_element}, product));
}

Choice choose(const LinearProduct& product) {
  return choice_of(decide({active_isa(), product.weight, product.weight_only, product.x_element}, product));
}

Choice choose(Element weight, bool weight_only, Element x_element, int64_t tokens, int64_t out_features,
              int64_t in_features) {
  return choose({weight, weight_only, x_element, tokens, out_features, in_features});
}

const Kernels& kernels_for(Element weight, bool weight_only, Element x_element, int64_t tokens, int64_t out_features,
                           int64_t in_features) {
  const Candidates candidates(active_isa(), weight, weight_only, x_element);
  const Decision decision = decide(candidates, {weight, weight_only, x_element, tokens, out_features, in_features});
  return decision.kernels ? *decision.kernels : candidates.best();
}

const Kernels& packing_kernels(Element weight, bool weight_only, Element x_element, Element panel_element) {
  // Those of AVX2 quantise to another form: q, not q + 128.
  [[maybe_unused]] const bool quantized = panel_element == Element::I8;
  Isa isa = active_isa();
#if defined(__x86_64__)
  if (quantized && isa == Isa::AVX2) isa = Isa::PORTABLE;
#endif
  const Candidates candidates(isa, weight, weight_only, x_element);
  for (const Kernels* kernels : candidates.kernels) {
    if (kernels && kernels->strip_rows == 1 && kernels->panel_element == panel_element) return *kernels;
  }
  throw std::logic_error("no kernels pack x this way");
}

std::vector<const char*> kernels_of(Element weight, bool weight_only, Element x_element) {
  const Candidates candidates(active_isa(), weight, weight_only, x_element);
  std::vector<const char*> names;
  for (const Kernels* kernels : candidates.kernels) {
    if (kernels && std::find(names.begin(), names.end(), std::string_view(kernels->name)) == names.end())
      names.push_back(kernels->name);
  }
  if (candidates.many) names.push_back(candidates.many->name);
  return names;
}

bool force_kernels(const std::string& name) {
  const char* const found = known(name);
  if (found) forced = found;
  return found != nullptr;
}

void set_tuned(std::vector<Tuned> tuned) {
  // Tables stay for ever, since a thread may be reading any: a few kilobytes each time one is loaded.
  static std::mutex mutex;
  static std::vector<std::unique_ptr<const Table>> tables;
  Table table;
  for (Tuned& one : tuned) {
    const LinearProduct& product = one.product;
    const Candidates candidates(one.isa, product.weight, product.weight_only, product.x_element);
    if (one.isa > best_isa() || (one.kernels != DENSE && !candidates.find(one.kernels))) continue;
    Entry entry = entry_of(product, one.isa, one.threads);
    entry.kernels = known(one.kernels);
    entry.reason = std::move(one.reason);
    table.push_back(std::move(entry));
  }
  std::sort(table.begin(), table.end());
  const std::lock_guard lock(mutex);
  tables.push_back(std::make_unique<const Table>(std::move(table)));
  tuned_table.store(tables.back()->empty() ? nullptr : tables.back().get(), std::memory_order_release);
}

}  // namespace sparse24::cpu
