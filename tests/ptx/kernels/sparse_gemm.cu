// C[M, N] = A[M, K] B[N, K]^T for a 2:4 sparse A of half precision, summed in float.
//
// A block makes a tile of 128 x 128 with four warps of 64 x 64; K goes by in steps of 64, which cp.async brings into a
// ring of three stages. K is a multiple of 64, N is even; rows beyond M and N are filled with zeros.
//
//   values    [M, K/2] f16       the kept values, two of each four
//   metadata  [M/128][K/64][8][32] u32: a word a lane of each 16 rows. The low half is of row lane/4, the high half of
//             row lane/4 + 8; each has 16 columns from lane%4 * 16. mma.sp reads lanes 0 and 1 of four with selector
//             0, lanes 2 and 3 with selector 1.
//
// In shared memory, the 16-byte chunks of a row are permuted so that neither cp.async nor ldmatrix meets a bank twice.
#include <cuda_fp16.h>

#include <cstdint>

constexpr int TILE = 128;     // rows of A and of B of a block
constexpr int TILE_K = 64;    // columns of B of a stage
constexpr int STAGES = 3;     // 75 KB of shared memory
constexpr int THREADS = 128;  // 2 x 2 warps
constexpr int A_BYTES = 64;   // of a row of values in a stage
constexpr int B_BYTES = 128;  // of a row of B in a stage
constexpr int META_BYTES = 1024;
constexpr int B_START = TILE * A_BYTES, META_START = B_START + TILE * B_BYTES;
constexpr int STAGE_BYTES = META_START + META_BYTES;

__device__ uint32_t a_chunk(int row, int chunk) { return row * A_BYTES + ((chunk ^ ((row >> 1) & 3)) << 4); }
__device__ uint32_t b_chunk(int row, int chunk) { return row * B_BYTES + ((chunk ^ (row & 7)) << 4); }

// 16 bytes, or zeros where there is nothing to copy.
__device__ void copy_async(uint32_t to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(exists ? 16 : 0) : "memory");
}

__device__ void load_matrices(uint32_t (&fragment)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(address)
               : "memory");
}

template <int SELECTOR>
__device__ void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata),
        "n"(SELECTOR));
}

extern "C" __global__ void __launch_bounds__(THREADS)
    sparse_gemm(const __half* __restrict__ values, const uint32_t* __restrict__ metadata, const __half* __restrict__ b,
                float* __restrict__ c, int M, int N, int K) {
  extern __shared__ __align__(128) uint8_t ring[];
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(ring));
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int row_0 = blockIdx.y * TILE, column_0 = blockIdx.x * TILE;
  const int warp_row = (warp % 2) * 64, warp_column = (warp / 2) * 64;
  const int steps = K / TILE_K;
  const int pitch = K / 2;  // elements between two rows of values

  auto load = [&](int step) {
    const uint32_t stage = shared + (step % STAGES) * STAGE_BYTES;
    for (int i = thread; i < TILE * 4; i += THREADS) {
      const int row = i / 4, chunk = i % 4;
      copy_async(stage + a_chunk(row, chunk), values + int64_t(row_0 + row) * pitch + step * (TILE_K / 2) + chunk * 8,
                 row_0 + row < M);
    }
    for (int i = thread; i < TILE * 8; i += THREADS) {
      const int row = i / 8, chunk = i % 8;
      copy_async(stage + B_START + b_chunk(row, chunk), b + int64_t(column_0 + row) * K + step * TILE_K + chunk * 8,
                 column_0 + row < N);
    }
    if (thread < META_BYTES / 16)
      copy_async(stage + META_START + thread * 16,
                 metadata + (int64_t(blockIdx.y) * steps + step) * (META_BYTES / 4) + thread * 4, true);
  };

  float sums[4][8][4] = {};
  for (int step = 0; step < STAGES - 1; ++step) {
    if (step < steps) load(step);
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  for (int step = 0; step < steps; ++step) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
    __syncthreads();  // the stage has arrived from all threads, and the one to be overwritten has been read by all
    if (step + STAGES - 1 < steps) load(step + STAGES - 1);
    asm volatile("cp.async.commit_group;" ::: "memory");

    const int stage = (step % STAGES) * STAGE_BYTES;
    uint32_t words[4];
    for (int m = 0; m < 4; ++m)
      words[m] = *reinterpret_cast<uint32_t*>(ring + stage + META_START + ((warp_row / 16 + m) * 32 + lane) * 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t fragments[4][4];
#pragma unroll
      for (int m = 0; m < 4; ++m)
        load_matrices(fragments[m], shared + stage + a_chunk(warp_row + m * 16 + lane % 16, half * 2 + lane / 16));
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        uint32_t column[4];
        load_matrices(column, shared + stage + B_START + b_chunk(warp_column + n * 8 + lane % 8, half * 4 + lane / 8));
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          if (half == 0) multiply<0>(sums[m][n], fragments[m], column, words[m]);
          if (half == 1) multiply<1>(sums[m][n], fragments[m], column, words[m]);
        }
      }
    }
  }

#pragma unroll
  for (int m = 0; m < 4; ++m)
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_0 + warp_row + m * 16 + half * 8 + lane / 4;
        const int column = column_0 + warp_column + n * 8 + (lane % 4) * 2;
        if (row < M && column < N)
          *reinterpret_cast<float2*>(c + int64_t(row) * N + column) =
              make_float2(sums[m][n][2 * half], sums[m][n][2 * half + 1]);
      }
}
