// Tensor cores and asynchronous copies: the few PTX instructions the attention kernels use.
//
// Fragments of m16n8k16 (lane = thread of the warp):
//   A 16 x 16 row-major    four registers, one load_matrices at row lane % 16, column lane / 16 * 8
//   B 16 x 8 (k x n)       two registers; from memory that is [n][k] a plain load, from memory that
//                          is [k][n] a transposed one; a load of four matrices gives two B
//   C 16 x 8 float         c[0], c[1]: row lane / 4, columns lane % 4 * 2 + {0, 1};
//                          c[2], c[3]: eight rows further down
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "common/reduce.cuh"

namespace elastic_cache::cuda {

// Columns added to a bf16 row in shared memory: rows then start 16 bytes further along the banks,
// so that the eight rows of a matrix load hit different ones (for widths that are multiples of 32).
inline constexpr int kRowPad = 8;

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory; nothing is read or written unless `is_valid`. Without a
// branch, behind which the addresses of the next copy would wait.
__device__ inline void copy_async_if(bool is_valid, void* shared, const void* global) {
  asm volatile(
      "{ .reg .pred p; setp.ne.s32 p, %2, 0; @p cp.async.cg.shared.global [%0], [%1], 16; }" ::"r"(
          shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(static_cast<int>(is_valid))
      : "memory");
}

// 16 bytes from global to shared memory; zeros, and nothing is read, unless `is_valid`.
__device__ inline void copy_async(void* shared, const void* global, bool is_valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(is_valid ? 16 : 0)
               : "memory");
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most kPending of this thread's latest groups are under way.
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices; lane i gives the address of row i % 8 of matrix i / 8.
__device__ inline void load_matrices(uint32_t (&r)[4], const __nv_bfloat16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const __nv_bfloat16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Two matrices, addressed by lanes 0 to 15.
__device__ inline void load_matrices_transposed(uint32_t (&r)[2], const __nv_bfloat16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two neighbouring elements of a fragment.
__device__ inline uint32_t packed(float a, float b) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// This thread's address for the A fragment at (row, column) of a matrix in shared memory; the same
// places serve a transposed load of two B from [k][n].
__device__ inline int a_row() { return static_cast<int>(threadIdx.x) & 15; }
__device__ inline int a_column() { return (static_cast<int>(threadIdx.x) >> 4 & 1) * 8; }

// The same for two B (n = 0 .. 7 in registers 0 and 1, n = 8 .. 15 in 2 and 3) from [n][k].
__device__ inline int b_row() {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  return (lane & 7) + (lane >> 4) * 8;
}
__device__ inline int b_column() { return (static_cast<int>(threadIdx.x) >> 3 & 1) * 8; }

}  // namespace elastic_cache::cuda
