// The models of the tensor cores as data, conversions, and the choice of an instruction set.
#include <algorithm>
#include <array>
#include <atomic>

#include "csrc/ptx/numbers.h"
#include "csrc/ptx/tensor/arithmetic.h"

namespace sparse24::ptx::tensor {
namespace {

std::array<float, 256> make_fp8(const Format& format) {
  std::array<float, 256> values{};
  for (uint32_t bits = 0; bits < 256; ++bits) values[bits] = decode(bits, format);
  return values;
}

bool has_avx512() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
#else
  return false;
#endif
}

constexpr Arithmetic PORTABLE{"portable", portable::floats, portable::integers};
#if defined(__x86_64__)
constexpr Arithmetic AVX512{"avx512", avx512::floats, avx512::integers};
#else
constexpr const Arithmetic& AVX512 = PORTABLE;
#endif

const Arithmetic* best() {
  static const Arithmetic* const chosen = has_avx512() ? &AVX512 : &PORTABLE;
  return chosen;
}

std::atomic<const Arithmetic*> forced{nullptr};

}  // namespace

// Source: the model files of MATLAB-tensor-core (A100TC, AdaTC, H100TC, B200TC; Khattak & Mikaitis, arXiv 2512.07004).
// With these numbers all outputs of mma and wmma published there come out bit for bit, 42 sets of 5000: f16 (C in f32
// and f16), bf16 and tf32 of A100, A2, Ada, L40S under SM_80, of H100, H200, B200 under SM_90; fp8 of Ada and L40S
// under SM_80; fp8 of H100, H200 (C in f16) and B200 under SM_90. (H100's wgmma of fp8 is another: 32 products, 13
// bits, 14 significant.) Which of -132 and -133 is the lowest exponent those outputs do not tell. Not checked against
// anything: fp8 m16n8k16.
Model model_of(Numerics numerics, Type type, bool half, uint32_t products) {
  Model model{.numerics = numerics};
  const bool hopper = numerics == Numerics::SM_90;
  const bool fp8 = type == Type::E4M3 || type == Type::E5M2;
  const bool ada = fp8 && !hopper;  // the first of SM_80's line to have fp8
  model.through_f16 = fp8 && hopper;
  model.products = hopper || ada ? 16 : 8;
  if (type == Type::TF32) model.products /= 2;
  if (products != 0) model.products = static_cast<int>(std::min<uint32_t>(products, MAX_DEPTH));
  model.fraction = ada ? 13 : hopper ? 25 : 24;
  model.significant = ada ? 14 : 24;
  model.floor = half ? (hopper ? -21 : -20) : (hopper ? -133 : -132);
  return model;
}

const uint16_t* dense_source() {
  static const std::array<uint16_t, MAX_K> source = [] {
    std::array<uint16_t, MAX_K> rows{};
    for (int i = 0; i < MAX_K; ++i) rows[i] = static_cast<uint16_t>(8 * i);
    return rows;
  }();
  return source.data();
}

const float* fp8_values(Type type) {
  static const std::array<float, 256> e4m3 = make_fp8(E4M3), e5m2 = make_fp8(E5M2);
  return (type == Type::E4M3 ? e4m3 : e5m2).data();
}

int smallest_exponent(Type type) {
  switch (type) {
    case Type::F16:
      return HALF.exponent_min;
    case Type::E4M3:
      return E4M3.exponent_min;
    case Type::E5M2:
      return E5M2.exponent_min;
    default:
      return SINGLE.exponent_min;  // as BF16 and TF32
  }
}

float rounded_to_half(double value) { return half_to_float(encode(value, HALF, Rounding::NEAREST_EVEN)); }

const Arithmetic& arithmetic() {
  const Arithmetic* const chosen = forced.load(std::memory_order_relaxed);
  return chosen != nullptr ? *chosen : *best();
}

bool force_arithmetic(std::string_view name) {
  if (name.empty()) {
    forced = nullptr;
  } else if (name == PORTABLE.name) {
    forced = &PORTABLE;
  } else if (name == AVX512.name && has_avx512()) {
    forced = &AVX512;
  } else {
    return false;
  }
  return true;
}

}  // namespace sparse24::ptx::tensor
