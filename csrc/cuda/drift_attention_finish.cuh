// The end of both comparisons of drift_attention: cosines -> similarity of a sequence.
// The subtle thing: the last block of a sequence to finish adds the cosines up; who is last depends
// on timing, the order of the sum does not.
#pragma once

#include <cmath>

#include "common/reduce.cuh"
#include "drift_attention_sequence.cuh"

namespace elastic_cache::cuda::drift {

constexpr float kMinNorm = 1e-8f;

__device__ inline float cosine(float dot, float square, float other_square) {
  return dot / (fmaxf(sqrtf(square), kMinNorm) * fmaxf(sqrtf(other_square), kMinNorm));
}

// Sums over keys: `count` blocks from `first` on for every tracked row. Those of skipped rows may
// be anything.
struct Cosines {
  const double* data;  // [max_tracked, stride]
  int stride;
  int first;
  int count;
};

__device__ inline void write_similarity(const DriftAttentionParams& p, const Sequence& q,
                                        const Cosines& cosines, double* reduced) {
  int tracked = 0;
  double total = 0.0;
  const int num_keys = q.end_key - q.first_key, num_threads = static_cast<int>(blockDim.x);
  for (int i = static_cast<int>(threadIdx.x); i < q.num_tracked; i += num_threads) {
    tracked += p.rows[q.begin + i] >= 0 ? 1 : 0;
  }
  const int num_sums = num_keys > 0 ? q.num_tracked * cosines.count : 0;
#pragma unroll 2
  for (int i = static_cast<int>(threadIdx.x); i < num_sums; i += num_threads) {
    const int row = i / cosines.count, block = cosines.first + i % cosines.count;
    const bool is_listed = p.rows[q.begin + row] >= 0;
    const double sum =
        __ldcg(cosines.data + int64_t{q.first_tracked + row} * cosines.stride + block);
    if (is_listed) total += sum;
  }
  const double num_tracked = block_sum(static_cast<double>(tracked), reduced);
  total = block_sum(total, reduced);
  if (threadIdx.x != 0) return;
  const bool has_any = num_tracked > 0.0 && num_keys > 0;
  const double mean = has_any ? total / (num_tracked * num_keys) : INFINITY;
  p.similarity[q.index] = q.fits ? mean : NAN;
}

// Called by a whole block when what its thread 0 wrote to the cosines is complete; by all blocks of
// a sequence but those of the grid's last row.
__device__ inline void finish(const DriftAttentionParams& p, const Sequence& q,
                              const Cosines& cosines, unsigned int* finished, double* reduced) {
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(finished + q.index, 1u) == gridDim.x * (gridDim.y - 1) - 1;
    __threadfence();
  }
  __syncthreads();
  if (is_last) write_similarity(p, q, cosines, reduced);
}

}  // namespace elastic_cache::cuda::drift
