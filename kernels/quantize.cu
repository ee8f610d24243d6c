// x of float type to int8, one scale a row, by QuantizeArguments' rule (linear.cuh). Grid: x = tokens, one block each.
//
// A block reads its row twice, for the largest magnitude and for the quotients; the second time it comes from cache.
// Magnitudes are compared as the bits of |x| in float32, among which NaN and Inf rank above every finite number.
#include "epilogue.cuh"
#include "linear.cuh"
#include "quantize.cuh"

namespace sparse24::quantize {
namespace {

constexpr uint32_t INFINITE = 0x7f800000;

// x[first .. first + 3] of a row; 0 from in_features on.
__device__ __forceinline__ void load_quad(float (&x)[QUAD], const QuantizeArguments& arguments, int64_t row, bool quads,
                                          int first) {
#pragma unroll
  for (int i = 0; i < QUAD; ++i) x[i] = 0;
  const int count = min(arguments.in_features - first, QUAD);
  add_numbers(x, arguments.x, arguments.x_type, row + first, quads, count);
}

// The largest of all threads, in all threads.
__device__ __forceinline__ uint32_t block_max(uint32_t x) {
  __shared__ uint32_t of_warp[THREADS / 32];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x = max(x, __shfl_xor_sync(~0u, x, distance));
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; ++warp) x = max(x, of_warp[warp]);
  return x;
}

__device__ __forceinline__ void quantize_row(const QuantizeArguments& arguments) {
  const int64_t token = blockIdx.x, row = token * arguments.x_stride;
  const bool quads = moves_in_quads(arguments.x, arguments.x_stride, arguments.x_type);

  uint32_t most = 0;
  for (int first = threadIdx.x * QUAD; first < arguments.in_features; first += THREADS * QUAD) {
    float x[QUAD];
    load_quad(x, arguments, row, quads, first);
#pragma unroll
    for (int i = 0; i < QUAD; ++i) most = max(most, __float_as_uint(fabsf(x[i])));
  }
  most = block_max(most);

  const bool finite = most < INFINITE;
  float scale = finite ? __fdiv_rn(__uint_as_float(most), 127.0f) : __int_as_float(0x7fc00000);
  if (scale == 0) scale = 1;
  if (threadIdx.x == 0) arguments.scales[token] = scale;

  uint32_t* const q = reinterpret_cast<uint32_t*>(arguments.q + token * arguments.q_stride);
  for (int first = threadIdx.x * QUAD; first < arguments.q_stride; first += THREADS * QUAD) {
    float x[QUAD] = {};
    if (finite) load_quad(x, arguments, row, quads, first);
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < QUAD; ++i) word |= (static_cast<uint32_t>(quantized(x[i], scale)) & 0xff) << (8 * i);
    q[first / QUAD] = word;
  }
}

}  // namespace
}  // namespace sparse24::quantize

extern "C" __global__ void __launch_bounds__(sparse24::quantize::THREADS)
    quantize_rows(const __grid_constant__ sparse24::QuantizeArguments arguments) {
  sparse24::quantize::quantize_row(arguments);
}
