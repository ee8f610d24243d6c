// Which instruction set the CPU kernels use: the best the machine has, unless a caller forces a lesser one.
#pragma once

namespace sparse24::cpu {

enum class Isa {
  PORTABLE,  // plain C++
#if defined(__aarch64__)
  NEON,  // what every AArch64 CPU has
#else
  AVX2,         // AVX2, FMA, F16C, BMI2
  AVX512,       // F, BW, VL, DQ, VBMI, VBMI2, VNNI (Ice Lake, Zen 4)
  AVX512_BF16,  // AVX512 and BF16 (Zen 4, Cooper Lake)
  AMX,          // AVX512_BF16 and tiles of int8 and bfloat16 (Sapphire Rapids)
#endif
};

const char* name_of(Isa isa);  // "portable", "neon", "avx2", ...

Isa best_isa();           // what this machine can run
Isa active_isa();         // what the kernels use now
void force_isa(Isa isa);  // process-wide; the caller has checked isa <= best_isa()

}  // namespace sparse24::cpu
