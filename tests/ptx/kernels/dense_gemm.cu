// C[M, N] = A[M, K] B[K, N] in half precision, summed in float: one tile of 64 x 64 a block of four warps, loaded by
// plain vector loads between two barriers. M, N are multiples of 64, K of 32. B is transposed by ldmatrix.
#include <cuda_fp16.h>

#include <cstdint>

constexpr int TILE = 64, TILE_K = 32;
constexpr int A_PITCH = TILE_K + 8, B_PITCH = TILE + 8;  // 8 more, so that the rows of ldmatrix are in different banks

extern "C" __global__ void dense_gemm(const __half* __restrict__ a, const __half* __restrict__ b, float* __restrict__ c,
                                      int N, int K) {
  __shared__ __align__(16) __half a_tile[TILE * A_PITCH], b_tile[TILE_K * B_PITCH];
  const int thread = threadIdx.x, lane = thread % 32, warp_row = (thread / 32) * 16;
  const int row_0 = blockIdx.y * TILE, column_0 = blockIdx.x * TILE;
  float sums[8][4] = {};
  for (int k = 0; k < K; k += TILE_K) {
    for (int i = thread; i < TILE * TILE_K / 8; i += 128) {
      const int a_row = i / 4, a_column = i % 4 * 8, b_row = i / 8, b_column = i % 8 * 8;
      *reinterpret_cast<uint4*>(a_tile + a_row * A_PITCH + a_column) =
          *reinterpret_cast<const uint4*>(a + (row_0 + a_row) * K + k + a_column);
      *reinterpret_cast<uint4*>(b_tile + b_row * B_PITCH + b_column) =
          *reinterpret_cast<const uint4*>(b + (k + b_row) * N + column_0 + b_column);
    }
    __syncthreads();  // the tiles are complete
#pragma unroll
    for (int step = 0; step < TILE_K; step += 16) {
      uint32_t left[4], right[2];
      const __half* from = a_tile + (warp_row + lane % 16) * A_PITCH + step + lane / 16 * 8;
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(left[0]), "=r"(left[1]), "=r"(left[2]), "=r"(left[3])
                   : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(from)))
                   : "memory");
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const __half* row = b_tile + (step + lane % 16) * B_PITCH + n * 8;
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                     : "=r"(right[0]), "=r"(right[1])
                     : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
                     : "memory");
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sums[n][0]), "+f"(sums[n][1]), "+f"(sums[n][2]), "+f"(sums[n][3])
            : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
      }
    }
    __syncthreads();  // the tiles may be overwritten
  }
  for (int n = 0; n < 8; ++n)
    for (int half = 0; half < 2; ++half) {
      const int row = row_0 + warp_row + half * 8 + lane / 4, column = column_0 + n * 8 + lane % 4 * 2;
      *reinterpret_cast<float2*>(c + row * N + column) = make_float2(sums[n][2 * half], sums[n][2 * half + 1]);
    }
}
