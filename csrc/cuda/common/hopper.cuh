// Barriers in shared memory, tensor copies and clusters (compute capability 9.0): the few PTX
// instructions that kernels for it use.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace elastic_cache::cuda {

// ---- barriers ----

__device__ inline void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialized barriers known to the copy engine and to the cluster.
__device__ inline void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and lets the phase end only when `bytes` have been copied as well.
__device__ inline void expect_bytes(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ inline void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ inline bool has_ended(uint32_t barrier, int parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

__device__ inline void wait_barrier(uint32_t barrier, int parity) {
  while (!has_ended(barrier, parity)) {
  }
}

// ---- tensor copies ----

__device__ inline void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Weights are read once: they are the first to leave the L2 (without this hint: 3 to 8 % slower).
// x is read by every block. An explicit evict_normal is slower than either.
__device__ inline uint64_t evict_first_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ inline uint64_t evict_last_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ inline void copy_box(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int c0,
                                int c1, int c2, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "l"(policy)
      : "memory");
}

__device__ inline void copy_box(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int c0,
                                int c1, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "l"(policy)
      : "memory");
}

// ---- clusters ----

__device__ inline void arrive_cluster() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}

__device__ inline void wait_cluster() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// 8 or 16 bytes of the shared memory of block `rank` of the cluster.
__device__ inline void load_from(uint32_t shared, int rank, uint32_t (&v)[2]) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %2, %3;\n"
      "ld.shared::cluster.v2.b32 {%0, %1}, [remote];\n}"
      : "=r"(v[0]), "=r"(v[1])
      : "r"(shared), "r"(rank)
      : "memory");
}

__device__ inline void load_from(uint32_t shared, int rank, float (&v)[4]) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];\n}"
      : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
      : "r"(shared), "r"(rank)
      : "memory");
}

}  // namespace elastic_cache::cuda
