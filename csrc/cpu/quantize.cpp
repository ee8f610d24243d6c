// The loops of quantize.h in plain C++, written so that compilers vectorise them.
#include "csrc/cpu/quantize.h"

#include <algorithm>
#include <bit>

#include "csrc/cpu/half.h"
#include "csrc/cpu/isa.h"

namespace sparse24::cpu {
namespace {

template <class Run>
auto with_reader(const void* x, Element element, const Run& run) {
  const auto half = static_cast<const uint16_t*>(x);
  if (element == Element::F16) return run([=](int64_t i) { return f16_to_float(half[i]); });
  if (element == Element::BF16) return run([=](int64_t i) { return bf16_to_float(half[i]); });
  return run([=](int64_t i) { return static_cast<const float*>(x)[i]; });
}

uint32_t largest(const void* x, Element element, int64_t count) {
  return with_reader(x, element, [=](const auto& at) {
    int32_t bits = 0;
    for (int64_t i = 0; i < count; ++i) bits = std::max(bits, std::bit_cast<int32_t>(at(i)) & 0x7fffffff);
    return static_cast<uint32_t>(bits);
  });
}

void quantize(const void* x, Element element, int64_t count, float scale, int8_t* q) {
  with_reader(x, element, [=](const auto& at) {
    for (int64_t i = 0; i < count; ++i) {
      // Adding 1.5 * 2^23 rounds to a whole number, ties to even.
      const float quotient = at(i) / scale, number = quotient == quotient ? quotient : 0.0f;
      const float clamped = std::min(std::max(-127.0f, number), 127.0f);
      q[i] = static_cast<int8_t>(static_cast<int32_t>(clamped + 12582912.0f - 12582912.0f));
    }
    return 0;
  });
}

constexpr Quantizer QUANTIZER{largest, quantize};

}  // namespace

const Quantizer& portable_quantizer() { return QUANTIZER; }

const Quantizer& quantizer() {
#if defined(__x86_64__)
  if (active_isa() >= Isa::AVX512) return avx512_quantizer();
#endif
  return portable_quantizer();
}

}  // namespace sparse24::cpu
