// A block owns a sequence in one layer. A position's rank is one 64-bit key: its mass as an
// unsigned integer of the same order, then the inverted position, so that equal masses go to the
// lower position and the best is a plain integer maximum, whatever the order it is taken in. Layers
// that fail meet in an integer minimum, which has no order either.
#include "elastic_cache/drift_decision.h"

#include "common/launch.h"
#include "common/reduce.cuh"

namespace elastic_cache {
namespace {

constexpr int kThreads = 256;
using Key = unsigned long long;

// 0 is no position; a NaN ranks below every number.
__device__ Key rank_of(float mass, int32_t position) {
  const unsigned int bits = __float_as_uint(mass + 0.0f);  // -0 becomes 0
  const unsigned int ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  const unsigned int high = mass != mass ? 1u : ordered;
  return Key{high} << 32 | ~static_cast<unsigned int>(position);
}

struct Largest {
  __device__ Key operator()(Key a, Key b) const { return a > b ? a : b; }
};

__device__ Key block_largest(Key key, Key* shared) {
  key = cuda::warp_reduce(key, Largest{});
  if (threadIdx.x % cuda::kWarpSize == 0) shared[threadIdx.x / cuda::kWarpSize] = key;
  __syncthreads();
  Key best = shared[0];
  for (int w = 1; w < kThreads / cuda::kWarpSize; ++w) best = Largest{}(best, shared[w]);
  __syncthreads();
  return best;
}

__global__ void __launch_bounds__(kThreads) drift_decision_kernel(DriftDecisionParams p) {
  __shared__ Key shared[kThreads / cuda::kWarpSize];
  const int64_t s = blockIdx.x, index = blockIdx.y, at = index * p.num_sequences + s;
  const float* mass = p.mass + at * p.capacity;
  const bool* masked = p.masked + s * p.capacity;
  const int32_t first = p.key_range[2 * s], end = p.key_range[2 * s + 1];
  if (threadIdx.x == 0 && p.similarity[at] < p.gamma[s]) {
    atomicMin(p.first_full_layer + s, static_cast<int32_t>(p.layer + index + 1));
  }
  Key last = ~Key{0};
  for (int64_t i = 0; i < p.track_num; ++i) {
    Key best = 0;
    for (int32_t k = first + static_cast<int32_t>(threadIdx.x); k < end; k += kThreads) {
      if (masked[k]) continue;
      const Key key = rank_of(mass[k], k);
      if (key < last && key > best) best = key;
    }
    last = block_largest(best, shared);
    if (threadIdx.x == 0) {
      p.tracked[at * p.track_num + i] =
          last == 0 ? -1 : static_cast<int32_t>(~static_cast<unsigned int>(last));
    }
  }
}

}  // namespace

void drift_decision_cuda(const DriftDecisionParams& params, Stream stream) {
  if (params.num_sequences == 0 || params.num_layers == 0) return;
  const dim3 grid(static_cast<unsigned int>(params.num_sequences),
                  static_cast<unsigned int>(params.num_layers));
  drift_decision_kernel<<<grid, kThreads, 0, stream>>>(params);
  cuda::check_launch("drift_decision");
}

}  // namespace elastic_cache
