// Finds the instruction sets of this machine and keeps the one in use (isa.h).
#include "csrc/cpu/isa.h"

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sparse24::cpu {
namespace {

#if defined(__x86_64__)
// Linux lets a process use the tiles that asks for them (Documentation/arch/x86/xstate.rst).
bool may_use_amx() {
  constexpr unsigned TILES = 1u << 22 | 1u << 24 | 1u << 25;  // leaf 7, EDX: AMX-BF16, AMX-TILE, AMX-INT8
  unsigned ignored = 0, features = 0;
  if (__get_cpuid_count(7, 0, &ignored, &ignored, &ignored, &features) == 0 || (features & TILES) != TILES)
    return false;
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#endif

Isa detect() {
#if defined(__x86_64__)
  // These ask the operating system too: without its support for the registers they say no.
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
        __builtin_cpu_supports("bmi2"))) {
    return Isa::PORTABLE;
  }
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni"))) {
    return Isa::AVX2;
  }
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::AVX512;
  return may_use_amx() ? Isa::AMX : Isa::AVX512_BF16;
#elif defined(__aarch64__)
  return Isa::NEON;
#else
  return Isa::PORTABLE;
#endif
}

std::atomic<Isa>& active() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

}  // namespace

const char* name_of(Isa isa) {
#if defined(__aarch64__)
  constexpr const char* NAMES[] = {"portable", "neon"};
#else
  constexpr const char* NAMES[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};
#endif
  return NAMES[static_cast<int>(isa)];
}

Isa best_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa active_isa() { return active().load(std::memory_order_relaxed); }

void force_isa(Isa isa) { active().store(isa, std::memory_order_relaxed); }

}  // namespace sparse24::cpu
