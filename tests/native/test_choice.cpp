// The choice of CPU kernels (linear_choice.h): the shipped rules for CPUs that this machine is not, what is forced, and
// what was measured.
#include <string>
#include <thread>

#include "csrc/cpu/linear/linear_choice.h"
#include "csrc/cpu/parallel.h"
#include "tests/native/check.h"

using namespace sparse24;
using namespace sparse24::cpu;

namespace {

std::string kernels(const Cpu& cpu, const LinearProduct& product) { return choose_by_rules(cpu, product).kernels; }

void test_rules() {
#if defined(__x86_64__)
  constexpr Element F32 = Element::F32, BF16 = Element::BF16, I8 = Element::I8, I4 = Element::I4;
  const Cpu zen{Vendor::AMD, Isa::AVX512_BF16}, ice_lake{Vendor::INTEL, Isa::AVX512};
  const Cpu sapphire_rapids{Vendor::INTEL, Isa::AMX}, haswell{Vendor::INTEL, Isa::AVX2};
  struct Expected {
    Cpu cpu;
    LinearProduct product;
    const char* kernels;
  };
  const Expected expected[] = {
      {zen, {F32, false, F32, 63, 768, 768}, "perm"},
      {zen, {F32, false, F32, 64, 768, 768}, "gather"},
      {zen, {F32, false, F32, 64, 383, 768}, "perm"},
      {zen, {BF16, false, BF16, 1576, 768, 768}, "perm"},
      {zen, {I8, false, F32, 1576, 768, 768}, "perm"},
      {ice_lake, {F32, false, F32, 16, 768, 768}, "perm"},
      {ice_lake, {F32, false, F32, 64, 768, 768}, "gather"},
      {ice_lake, {I8, false, F32, 1576, 768, 768}, "perm"},
      {sapphire_rapids, {BF16, false, BF16, 5, 768, 768}, "perm"},
      {sapphire_rapids, {BF16, false, BF16, 6, 768, 768}, "amx"},
      {sapphire_rapids, {BF16, false, F32, 1576, 768, 768}, "amx"},
      {sapphire_rapids, {I8, false, F32, 15, 768, 768}, "perm"},
      {sapphire_rapids, {I8, false, I8, 16, 768, 768}, "amx"},
      {sapphire_rapids, {I4, false, F32, 8, 768, 768}, "amx"},
      {sapphire_rapids, {F32, false, F32, 47, 768, 768}, "perm"},
      {sapphire_rapids, {F32, false, F32, 197, 768, 768}, "gather"},
      {sapphire_rapids, {F32, false, F32, 65, 768, 768}, "perm"},
      {sapphire_rapids, {I8, true, F32, 1576, 768, 768}, "perm"},
      {sapphire_rapids, {I8, true, BF16, 6, 768, 768}, "amx"},
      {haswell, {F32, false, F32, 1576, 768, 768}, "perm"},
      {{Vendor::AMD, Isa::PORTABLE}, {F32, false, F32, 1, 768, 768}, "dense"},
      {{Vendor::AMD, Isa::PORTABLE}, {I8, false, F32, 1, 768, 768}, "portable"},
  };
  for (const Expected& e : expected) {
    CHECK(kernels(e.cpu, e.product) == e.kernels, kernels(e.cpu, e.product), " for M ", e.product.tokens, ", expected ",
          e.kernels);
  }
#endif
}

void test_force() {
  const LinearProduct product{Element::F32, false, Element::F32, 5, 64, 64};
  const std::string unforced = choose(product).kernels;
  CHECK(!force_kernels("nothing"));
  CHECK(force_kernels("dense") && choose(product).kernels == std::string("dense"));
  std::thread([&] { CHECK(choose(product).kernels == unforced, "another thread's force"); }).join();
  CHECK(force_kernels("portable") && choose(product).kernels == std::string("portable"));
  CHECK(force_kernels("") && choose(product).kernels == unforced);
}

void test_tuned() {
  const Isa isa = active_isa();
  const auto of = [](int64_t tokens) { return LinearProduct{Element::F32, false, Element::F32, tokens, 100, 200}; };
  const std::string shipped = choose(of(8)).kernels, other = shipped == "dense" ? "portable" : "dense";
  set_tuned({{of(64), isa, thread_count(), shipped, "slow"},
             {of(8), isa, thread_count(), other, "measured"},
             {of(16), isa, thread_count(), other, "measured"},
             {of(300), isa, thread_count() + 1, other, "of another thread count"},
             {of(400), isa, thread_count(), "nothing", "of kernels that are not"}});
  CHECK(choose(of(8)).kernels == other && choose(of(8)).reason == std::string("measured"));
  CHECK(choose(of(12)).kernels == other, "between two that agree");
  CHECK(choose(of(64)).kernels == shipped && choose(of(64)).reason == std::string("slow"));
  for (int64_t tokens : {1, 7, 32, 300, 400}) {
    CHECK(choose(of(tokens)).reason != std::string("measured"), "M ", tokens);
    CHECK(choose(of(tokens)).kernels == shipped, "M ", tokens);
  }
  LinearProduct wider = of(8);
  wider.in_features = 201;
  CHECK(choose(wider).reason != std::string("measured"), "another K");
  set_tuned({});
  CHECK(choose(of(8)).kernels == shipped);
}

}  // namespace

int main() {
  test_rules();
  test_force();
  test_tuned();
  std::printf("test_choice: passed\n");
}
