// The table of the CPU kernels (linear_choice.h): by the instruction set, the element types and the shape alone.
#include "csrc/cpu/linear_choice.h"

#include "csrc/cpu/isa.h"

namespace sparse24::cpu {

namespace {

// Where the gather kernels are faster on Zen 4, measured: by 3 to 8 %, as long as strips of 16 rows are nearly full.
bool suits_gather(Element weight, int64_t tokens, int64_t out_features) {
  const int64_t padded = (tokens + 15) / 16 * 16;
  return (weight == Element::F32 || weight == Element::F16) && tokens >= 64 && padded * 100 <= tokens * 102 &&
         out_features >= 384;
}

}  // namespace

const Kernels& kernels_for(Element weight, bool weight_only, Element x_element, int64_t tokens, int64_t out_features,
                           int64_t) {
#if defined(__x86_64__)
  const Isa isa = active_isa();
  if (isa >= Isa::AVX512_BF16) {
    if (const Kernels* kernels = avx512_bf16_kernels(weight, weight_only, x_element)) return *kernels;
  }
  if (isa >= Isa::AVX512) {
    if (suits_gather(weight, tokens, out_features)) {
      if (const Kernels* kernels = avx512_gather_kernels(weight, weight_only, x_element)) return *kernels;
    }
    if (const Kernels* kernels = avx512_kernels(weight, weight_only, x_element)) return *kernels;
  }
  if (isa >= Isa::AVX2) {
    if (const Kernels* kernels = avx2_kernels(weight, weight_only, x_element)) return *kernels;
  }
#elif defined(__aarch64__)
  if (active_isa() >= Isa::NEON) return *neon_kernels(weight, weight_only, x_element);
#endif
  return *portable_kernels(weight, weight_only, x_element);
}

Choice choose(Element weight, bool weight_only, Element x_element, int64_t tokens, int64_t out_features,
              int64_t in_features) {
  return {kernels_for(weight, weight_only, x_element, tokens, out_features, in_features).name,
          "the only kernels for it"};
}

}  // namespace sparse24::cpu
