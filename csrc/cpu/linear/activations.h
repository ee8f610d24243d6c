// The activations in float, without branches: a compiler vectorises loops over them. The AVX-512 code (vector_avx512.h)
// evaluates the same polynomials, whose coefficients live here.
#pragma once
#include "kernels/format.cuh"
#include "kernels/linear.cuh"

namespace sparse24::cpu {

// exp on |r| <= ln(2) / 2: minimax with the first two terms fixed, relative error 2^-27.
constexpr float EXP[] = {1, 1, 0.49999994f, 0.166665196f, 0.0416684002f, 0.00836885069f, 0.00138143206f};
// ln 2 in two parts, the first short enough for n * part to be exact; and 1 / ln 2.
constexpr float LN2_HIGH = 0x1.62e400p-1f, LN2_LOW = 0x1.7f7d1cp-20f, LOG2_E = 0x1.715476p+0f;
// With a = |x|: Phi(-a) = exp(-a^2 / 2) P(a) / Q(a), the ratio fitted for least relative error (0.8 * 2^-24) on [0,
// 15]; beyond that Phi(-a) is 0 in float. All coefficients are positive, so neither polynomial cancels.
constexpr float PHI_P[] = {0.5f, 0.439281467f, 0.183967561f, 0.0408805611f, 0.00415313636f};
constexpr float PHI_Q[] = {1, 1.67644794f, 1.20554199f, 0.471404506f, 0.102478487f, 0.0104102574f};
// 2 sqrt(2 / pi) and that times 0.044715.
constexpr float GELU_TANH_1 = 1.59576912161f, GELU_TANH_3 = 0.0713548162726f;

template <int COUNT>
SPARSE24_INLINE float polynomial(float t, const float (&coefficients)[COUNT]) {  // the constant term first
  float sum = coefficients[COUNT - 1];
  for (int i = COUNT - 2; i >= 0; --i) sum = __builtin_fmaf(sum, t, coefficients[i]);
  return sum;
}

// exp(z + small) for z <= 0 and |small| <= 2^-17. For NaN it is exp(-110): callers multiply by the NaN.
SPARSE24_INLINE float exp_negative(float z, float small) {
  z = z > -110 ? z : -110;
  const float n = __builtin_fmaf(z, LOG2_E, 12582912.0f) - 12582912.0f;  // rounds to a whole number
  const float r = __builtin_fmaf(-n, LN2_LOW, __builtin_fmaf(-n, LN2_HIGH, z)) + small;
  // 2^n as two factors, each of them normal.
  const int whole = static_cast<int>(n), half = whole >> 1;
  const float first = __builtin_bit_cast(float, (half + 127) << 23);
  const float second = __builtin_bit_cast(float, (whole - half + 127) << 23);
  return polynomial(r, EXP) * first * second;
}

// x times the logistic function of z: for z >= 0, x / (1 + exp(-z)); below, x exp(z) / (1 + exp(z)).
SPARSE24_INLINE float times_logistic(float x, float z) {
  const float e = exp_negative(-__builtin_fabsf(z), 0);
  return x * ((z < 0 ? e : 1) / (1 + e));
}

// x Phi(x), Phi the normal distribution: by its tail rather than by 1 + erf, which would cancel for x < 0.
SPARSE24_INLINE float gelu(float x) {
  const float a = __builtin_fabsf(x) < 15 ? __builtin_fabsf(x) : 15;
  const float square = a * a;
  const float e = exp_negative(-0.5f * square, -0.5f * __builtin_fmaf(a, a, -square));
  const float tail = e * (polynomial(a, PHI_P) / polynomial(a, PHI_Q));
  return x * (x < 0 ? tail : 1 - tail);
}

template <Activation ACTIVATION>
SPARSE24_INLINE float activate(float x) {
  switch (ACTIVATION) {
    case Activation::RELU:
      return x < 0 ? 0 : x;
    case Activation::GELU:
      return gelu(x);
    case Activation::GELU_TANH:
      return times_logistic(x, x * __builtin_fmaf(x * x, GELU_TANH_3, GELU_TANH_1));
    case Activation::SILU:
      return times_logistic(x, x);
    default:
      return x;
  }
}

}  // namespace sparse24::cpu
