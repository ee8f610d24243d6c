// PTX instructions that CUDA C++ has no word for: one function each. Shared addresses are the 32-bit ones of
// shared_address(). Source: PTX ISA, the section of each instruction's name.
#pragma once
#include <cstdint>

namespace sparse24::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// threadIdx.x and blockIdx.x. Volatile: what is computed from them after a long loop does not occupy registers in it.
__device__ __forceinline__ int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}
__device__ __forceinline__ int block_index() {
  int index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
}

// ---- Global memory ----

// 16 and 4 bytes of memory that nobody writes while the kernel runs, read once: past L1, which is left to what is
// read again. L2 keeps them as usual: a weight that fits there is found by the next call.
__device__ __forceinline__ uint4 load_streaming_16(const void* global) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(global));
  return x;
}
__device__ __forceinline__ uint32_t load_streaming_4(const void* global) {
  uint32_t x;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(x) : "l"(global));
  return x;
}

// ---- Global to shared memory, asynchronously ----

// Copies the first `source_bytes` (0 to BYTES) bytes and fills the rest of BYTES with zeros; both addresses are
// multiples of BYTES. Through L1, for the sake of blocks that read the same.
template <int BYTES>
__device__ __forceinline__ void cp_async_cached(uint32_t shared, const void* global, int source_bytes) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(global), "n"(BYTES), "r"(source_bytes)
               : "memory");
}
// All of BYTES, or zeros for all of them: cheaper than a number of bytes.
template <int BYTES>
__device__ __forceinline__ void cp_async_cached_or_zeros(uint32_t shared, const void* global, bool present) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
  asm volatile(
      "{ .reg .pred absent; setp.eq.u32 absent, %3, 0; cp.async.ca.shared.global [%0], [%1], %2, absent; }" ::"r"(
          shared),
      "l"(global), "n"(BYTES), "r"(static_cast<int>(present))
      : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's groups but the `PENDING` latest. Others see the bytes after a barrier.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---- Shared memory and registers ----

__device__ __forceinline__ void store_shared_4(uint32_t shared, uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(shared), "r"(x) : "memory");
}

// Four 8 x 8 matrices of 16 bits: matrix i has the row addresses of lanes 8i to 8i + 7; register i of lane l gets the
// 4 bytes at column l % 4 of row l / 4 of matrix i.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&x)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared)
               : "memory");
}

// ---- With a constant added to each address, which costs no instruction ----

// 16 bytes past L1, zeros from `source_bytes` on.
template <int TO, int FROM>
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, int source_bytes) {
  asm volatile("cp.async.cg.shared.global [%0 + %3], [%1 + %4], 16, %2;" ::"r"(shared), "l"(global), "r"(source_bytes),
               "n"(TO), "n"(FROM)
               : "memory");
}
template <int OFFSET>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&x)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared), "n"(OFFSET)
               : "memory");
}
template <int OFFSET>
__device__ __forceinline__ void load_shared(uint4& x, uint32_t shared) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(shared), "n"(OFFSET)
               : "memory");
}
template <int OFFSET>
__device__ __forceinline__ void load_shared(uint2& x, uint32_t shared) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2 + %3];" : "=r"(x.x), "=r"(x.y) : "r"(shared), "n"(OFFSET) : "memory");
}
template <int OFFSET>
__device__ __forceinline__ void load_shared(uint32_t& x, uint32_t shared) {
  asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(x) : "r"(shared), "n"(OFFSET) : "memory");
}
template <int OFFSET>
__device__ __forceinline__ void store_shared(uint32_t shared, const uint4& x) {
  asm volatile("st.shared.v4.u32 [%0 + %5], {%1, %2, %3, %4};" ::"r"(shared), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w),
               "n"(OFFSET)
               : "memory");
}

// base + min(COUNT, most) * step. Volatile: in a loop it is computed anew, where the compiler would keep a register
// pair for each COUNT.
template <uint32_t COUNT>
__device__ __forceinline__ const uint8_t* step_on(const uint8_t* base, uint32_t most, uint32_t step) {
  const uint8_t* sum;
  asm volatile(
      "{.reg .u32 count;\n"
      "min.u32 count, %2, %3;\n"
      "mad.wide.u32 %0, count, %4, %1;}"
      : "=l"(sum)
      : "l"(base), "r"(most), "n"(COUNT), "r"(step));
  return sum;
}

// ---- d += a * b, a 2:4 sparse (kernels/fragment.cuh has the fragments) ----
//
// Ordered metadata throughout: ptxas warns about plain mma.sp, and emulates it from sm_100 on. Volatile, so that ptxas
// starts from the order of the source.

// m16n8k32, 16-bit floats. SELECTOR 0 reads `meta` of lanes 0 and 1 of each quad, 1 that of lanes 2 and 3.
template <int SELECTOR>
__device__ __forceinline__ void mma_sp_f16(float (&d)[4], const uint4& a, const uint32_t (&b)[4], uint32_t meta) {
  static_assert(SELECTOR == 0 || SELECTOR == 1, "others are undefined, and ptxas accepts them");
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(meta), "n"(SELECTOR));
}
template <int SELECTOR>
__device__ __forceinline__ void mma_sp_bf16(float (&d)[4], const uint4& a, const uint32_t (&b)[4], uint32_t meta) {
  static_assert(SELECTOR == 0 || SELECTOR == 1, "others are undefined, and ptxas accepts them");
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(meta), "n"(SELECTOR));
}

// m16n8k64, signed bytes. The selector is 0: every lane's `meta` is read.
__device__ __forceinline__ void mma_sp_s8(int32_t (&d)[4], const uint4& a, const uint32_t (&b)[4], uint32_t meta) {
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(meta));
}

}  // namespace sparse24::ptx
