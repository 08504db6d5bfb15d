// Clusters of thread blocks (sm_90): their barrier, and access to each other's shared memory.
// A barrier has two halves, and every thread of every block must pass both as often as the others:
// what a thread wrote before cluster_arrive is seen by all of them after cluster_wait.
#pragma once

#include <cstdint>

#include "common/mma.cuh"

namespace elastic_cache::cuda {

__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// The address, in block `rank` of the cluster, of what lies at `shared` in this one.
__device__ inline uint32_t address_in(int rank, const void* shared) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(address)
               : "r"(shared_address(shared)), "r"(rank));
  return address;
}

__device__ inline void store_in(int rank, float2* shared, float2 x) {
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(address_in(rank, shared)),
               "f"(x.x), "f"(x.y)
               : "memory");
}

__device__ inline float4 load_from(int rank, const float* shared) {
  float4 x;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address_in(rank, shared))
               : "memory");
  return x;
}

// 2^x by the one instruction there is for it; results below 2^-126 become zero.
__device__ inline float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace elastic_cache::cuda
