// Reductions over a warp or a block in a fixed order: the same bits in every run.
#pragma once

#include <cstdint>

namespace elastic_cache::cuda {

inline constexpr unsigned int kFullWarp = 0xffffffffu;
inline constexpr int kWarpSize = 32;

// All lanes get the combination of all lanes; `combine` must be commutative and associative up to
// rounding, which is the same on every lane, because a butterfly adds the same pairs everywhere.
template <class T, class Combine>
__device__ inline T warp_reduce(T value, const Combine& combine) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = combine(value, __shfl_xor_sync(kFullWarp, value, offset));
  }
  return value;
}

struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

// The sum over the lanes up to this one.
__device__ inline int sum_through(int value) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int before = __shfl_up_sync(kFullWarp, value, offset);
    if (lane >= offset) value += before;
  }
  return value;
}

// All threads get the sum over the block; `shared` has room for one T a warp. Ends with a barrier,
// so that `shared` may be used again.
template <class T>
__device__ inline T block_sum(T value, T* shared) {
  value = warp_reduce(value, Sum{});
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  const int num_warps = static_cast<int>(blockDim.x) / kWarpSize;
  T total = shared[0];
#pragma unroll 16  // loads together, the sums in order
  for (int w = 1; w < num_warps; ++w) total += shared[w];
  __syncthreads();
  return total;
}

// The number of set flags in threads before this one, and in `total` that of the whole block.
// `shared` has room for one int a warp. Ends with a barrier.
__device__ inline int block_rank(bool flag, int* shared, int* total) {
  const unsigned int votes = __ballot_sync(kFullWarp, flag);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  if (lane == 0) shared[warp] = __popc(votes);
  __syncthreads();
  int before = 0, sum = 0;
  const int num_warps = static_cast<int>(blockDim.x) / kWarpSize;
  for (int w = 0; w < num_warps; ++w) {
    before += w < warp ? shared[w] : 0;
    sum += shared[w];
  }
  __syncthreads();
  *total = sum;
  return before + __popc(votes & ((1u << lane) - 1));
}

}  // namespace elastic_cache::cuda
