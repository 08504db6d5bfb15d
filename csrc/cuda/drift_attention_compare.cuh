// The comparison of drift_attention: what the scan left in the workspace -> similarity and mass.
// A block takes 128 keys of a tracked row: old log-sum-exp of every head from the maxima and sums
// of the scan's blocks, then the cosine over heads, a thread a key; the blocks of one more row add
// the heads' masses. The subtle thing: the last block of a sequence to finish adds the cosines up;
// who is last depends on timing, the order of the sum does not.
#pragma once

#include "drift_attention_plain.cuh"

namespace elastic_cache::cuda::drift {

constexpr float kMinNorm = 1e-8f;

// Old log-sum-exp (base 2) of every head, four threads a head.
__device__ inline void join_blocks(const DriftAttentionParams& p, const Workspace& w,
                                   const Sequence& q, int64_t tracked, float* old_lse) {
  const int quarter = static_cast<int>(threadIdx.x) % 4;
  const int num_heads = static_cast<int>(p.num_heads);
  for (int first = 0; first < num_heads; first += kBlockKeys / 4) {
    const int head = first + static_cast<int>(threadIdx.x) / 4;
    float2 all = make_float2(-INFINITY, 0.0f);
    if (head < num_heads) {
      const float2* from = w.softmax + (tracked * num_heads + head) * w.num_key_blocks;
#pragma unroll 4
      for (int b = q.first_key / kBlockKeys + quarter; b <= (q.end_key - 1) / kBlockKeys; b += 4) {
        all = join(all, from[b]);
      }
    }
    for (int offset = 1; offset < 4; offset *= 2) {
      all = join(all, make_float2(__shfl_xor_sync(kFullWarp, all.x, offset),
                                  __shfl_xor_sync(kFullWarp, all.y, offset)));
    }
    if (quarter == 0 && head < num_heads) old_lse[head] = all.x + log2f(all.y);
  }
  __syncthreads();
}

__device__ inline float cosine_at(const DriftAttentionParams& p, const Workspace& w,
                                  int64_t tracked, int position, const float* old_lse) {
  const int num_heads = static_cast<int>(p.num_heads);
  const int64_t start = tracked * p.num_heads * p.capacity + position;
  constexpr int kHeads = 16;
  float dot = 0.0f, old_square = 0.0f, recent_square = 0.0f;
  for (int first = 0; first < num_heads; first += kHeads) {
    float old[kHeads], recent[kHeads];  // loaded together: one latency for all of them
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      const int h = first + i;
      old[i] = h < num_heads ? w.old[start + h * p.capacity] : -INFINITY;
      recent[i] = h < num_heads ? w.recent[start + h * p.capacity] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      const float a = exp2f(old[i] - old_lse[min(first + i, num_heads - 1)]);
      dot += a * recent[i];
      old_square += a * a;
      recent_square += recent[i] * recent[i];
    }
  }
  return dot / (fmaxf(sqrtf(old_square), kMinNorm) * fmaxf(sqrtf(recent_square), kMinNorm));
}

__device__ inline void add_heads(const DriftAttentionParams& p, const Workspace& w,
                                 const Sequence& q, int position) {
  if (position >= p.capacity) return;
  const float* from = w.mass + q.index * p.capacity + position;
  float total = 0.0f;
  if (q.has_key(position)) {
#pragma unroll 16
    for (int h = 0; h < static_cast<int>(p.num_heads); ++h) {
      total += from[h * p.num_sequences * p.capacity];
    }
  }
  p.mass[q.index * p.capacity + position] = total;
}

// The cosines of a sequence, all of them written, -> its similarity. Called by a whole block.
__device__ inline void finish(const DriftAttentionParams& p, const Workspace& w, const Sequence& q,
                              double* reduced) {
  int tracked = 0;
  for (int i = static_cast<int>(threadIdx.x); i < q.num_tracked; i += kBlockKeys) {
    tracked += p.rows[q.begin + i] >= 0 ? 1 : 0;
  }
  const double num_tracked = block_sum(static_cast<double>(tracked), reduced);
  double total = 0.0;
  const int num_keys = q.end_key - q.first_key;
  if (num_keys > 0) {
    const int first = q.first_key / kBlockKeys, count = (q.end_key - 1) / kBlockKeys - first + 1;
    for (int i = static_cast<int>(threadIdx.x); i < q.num_tracked * count; i += kBlockKeys) {
      if (p.rows[q.begin + i / count] < 0) continue;
      total += __ldcg(w.cosines + int64_t{q.first_tracked + i / count} * w.num_key_blocks + first +
                      i % count);
    }
  }
  total = block_sum(total, reduced);
  if (threadIdx.x != 0) return;
  const bool has_any = num_tracked > 0.0 && num_keys > 0;
  const double mean = has_any ? total / (num_tracked * num_keys) : INFINITY;
  p.similarity[q.index] = q.fits ? mean : NAN;
}

// blockIdx.y: tracked rows y, y + rows_per_pass, ...; the last one adds masses.
__global__ void __launch_bounds__(kBlockKeys, 4)
    drift_compare_kernel(const DriftAttentionParams p, const Workspace w) {
  extern __shared__ float old_lse[];  // [H]
  __shared__ double reduced[kBlockKeys / kWarpSize];
  __shared__ bool is_last;
  const Sequence q(p, w, static_cast<int>(blockIdx.z));
  const int key_block = static_cast<int>(blockIdx.x);
  const int position = key_block * kBlockKeys + static_cast<int>(threadIdx.x);
  const int rows_per_pass = static_cast<int>(gridDim.y) - 1;
  if (static_cast<int>(blockIdx.y) == rows_per_pass) {
    add_heads(p, w, q, position);
    return;
  }
  const bool has_any =
      max(q.first_key, key_block * kBlockKeys) < min(q.end_key, (key_block + 1) * kBlockKeys);
  for (int i = static_cast<int>(blockIdx.y); has_any && i < q.num_tracked; i += rows_per_pass) {
    if (p.rows[q.begin + i] < 0) continue;
    const int64_t tracked = q.first_tracked + i;
    join_blocks(p, w, q, tracked, old_lse);
    const float cosine = q.has_key(position) ? cosine_at(p, w, tracked, position, old_lse) : 0.0f;
    const double total = block_sum(static_cast<double>(cosine), reduced);
    if (threadIdx.x == 0) w.cosines[tracked * w.num_key_blocks + key_block] = total;
  }
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(w.finished + q.index, 1u) == gridDim.x * (gridDim.y - 1) - 1;
    __threadfence();
  }
  __syncthreads();
  if (is_last) finish(p, w, q, reduced);
}

}  // namespace elastic_cache::cuda::drift
