// y = a polynomial of x whose coefficients are in constant memory, four elements a thread; then x = 0.
#include <cuda_fp16.h>

__constant__ float coefficients[4] = {1.0f, -2.0f, 0.5f, 0.25f};

extern "C" __global__ void polynomial(float* x, __half* __restrict__ y, int quads) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= quads) return;
  const float4 four = reinterpret_cast<const float4*>(x)[i];
  auto value = [](float t) {
    float sum = 0;
    for (int power = 3; power >= 0; --power) sum = __fadd_rn(__fmul_rn(sum, t), coefficients[power]);
    return sum;
  };
  reinterpret_cast<__half2*>(y)[2 * i] = __floats2half2_rn(value(four.x), value(four.y));
  reinterpret_cast<__half2*>(y)[2 * i + 1] = __floats2half2_rn(value(four.z), value(four.w));
  reinterpret_cast<float4*>(x)[i] = make_float4(0, 0, 0, 0);
}
