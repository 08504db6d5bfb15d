// The statistics of drift_attention from the scores that its part kernel kept: a block takes 32
// keys, a warp some of the heads, and either
//   mass    adds the weights of window rows over an eighth of the heads, or
//   cosine  takes, for a tracked row, the products and squares over heads, old against new.
// The warps' sums are added in order. The last block of a sequence to finish adds up what the
// others left: which one that is depends on timing, the order of the sums does not; the only atomic
// counts blocks.
#pragma once

#include <cmath>

#include "attention_parts.cuh"
#include "elastic_cache/drift_attention.h"

namespace elastic_cache::cuda::drift {

using attention::DriftParts;
using attention::kLog2E;

constexpr int kBlockKeys = kWarpSize;
constexpr int kNumWarps = 8;
constexpr int kNumThreads = kNumWarps * kWarpSize;
constexpr int kLoads = 8;  // of a thread at a time
constexpr int kMassParts = 8;
constexpr float kMinNorm = 1e-8f;

// What a block has to know about its sequence.
struct Sequence {
  int index;
  int begin;  // tracked rows: begin .. begin + num_tracked - 1
  int num_tracked;
  int window;  // window rows: window .. window + num_window - 1
  int num_window;
  int first_key;
  int end_key;
  int first_tracked;  // tracked rows of the sequences before
  bool fits;          // whether there was room for the tracked rows

  __device__ Sequence(const DriftAttentionParams& p, const DriftParts& d, int s) : index(s) {
    const int32_t* segment = p.segments + s * kSegmentColumns;
    begin = segment[kSegmentBegin];
    num_tracked = segment[kSegmentTracked];
    window = begin + num_tracked + segment[kSegmentCommitted];
    num_window = segment[kSegmentWindow];
    first_key = p.key_range[2 * s];
    end_key = max(p.key_range[2 * s + 1], first_key);
    int before = 0;
    for (int i = static_cast<int>(threadIdx.x) % kWarpSize; i < s; i += kWarpSize) {
      before += p.segments[i * kSegmentColumns + kSegmentTracked];
    }
    first_tracked = warp_reduce(before, Sum{});
    fits = first_tracked + num_tracked <= d.max_tracked;
    if (!fits) num_tracked = 0;
  }
};

// The sums over the warps of a block, in order, for every warp.
__device__ inline float3 add_warps(const float3& value, float3 (&shared)[kNumWarps][kWarpSize]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  __syncthreads();
  shared[threadIdx.x / kWarpSize][lane] = value;
  __syncthreads();
  float3 total = shared[0][lane];
#pragma unroll
  for (int w = 1; w < kNumWarps; ++w) {
    total.x += shared[w][lane].x;
    total.y += shared[w][lane].y;
    total.z += shared[w][lane].z;
  }
  return total;
}

// Weights of the window rows at a key, over this warp's share of (head, row) pairs; the heads are
// every kMassParts-th one from `part` on.
__device__ inline float add_window(const DriftAttentionParams& p, const DriftParts& d,
                                   const Sequence& q, int part, int position) {
  const int num_heads = static_cast<int>(p.num_heads);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int heads = (num_heads - part + kMassParts - 1) / kMassParts;
  const int num_pairs = heads * q.num_window;
  float total = 0.0f;
  for (int first = warp; first < num_pairs; first += kNumWarps * kLoads) {
    float score[kLoads], lse[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int pair = min(first + i * kNumWarps, num_pairs - 1);
      const int row = q.window + pair % q.num_window;
      const int item = row * num_heads + part + pair / q.num_window * kMassParts;
      // A skipped row's score is never written: asked for all the same, so as not to wait for rows.
      const float x = d.scores[item * p.capacity + position];
      const bool is_there = first + i * kNumWarps < num_pairs && p.rows[row] >= 0;
      score[i] = is_there ? x : -INFINITY;
      lse[i] = p.lse[item] * kLog2E;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) total += exp2f(score[i] - lse[i]);
  }
  return total;
}

// Over this warp's heads, of tracked row i at a key: old * new, old * old, new * new.
__device__ inline float3 compare(const DriftAttentionParams& p, const DriftParts& d,
                                 const Sequence& q, int i, int position) {
  const int num_heads = static_cast<int>(p.num_heads);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  float3 total = make_float3(0.0f, 0.0f, 0.0f);
  for (int first = warp; first < num_heads; first += kNumWarps * kLoads) {
    float before[kLoads], now[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int h = first + k * kNumWarps, head = min(h, num_heads - 1);
      const int item = (q.begin + i) * num_heads + head;
      const int old_item = (q.first_tracked + i) * num_heads + head;
      const float x = d.old_scores[old_item * p.capacity + position] - d.old_lse[old_item];
      const float y = d.scores[item * p.capacity + position] - p.lse[item] * kLog2E;
      before[k] = h < num_heads ? exp2f(x) : 0.0f;
      now[k] = h < num_heads ? exp2f(y) : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      total.x += before[k] * now[k];
      total.y += before[k] * before[k];
      total.z += now[k] * now[k];
    }
  }
  return total;
}

// What the blocks of a sequence left -> mass and similarity. Called by a whole block.
__device__ inline void finish(const DriftAttentionParams& p, const double* cosines,
                              const float* masses, int num_blocks, const Sequence& q,
                              double* reduced) {
  const int capacity = static_cast<int>(p.capacity);
  for (int k = static_cast<int>(threadIdx.x); k < capacity; k += kNumThreads) {
    float total = 0.0f;
#pragma unroll
    for (int part = 0; part < kMassParts; ++part) {
      total += __ldcg(masses + (part * p.num_sequences + q.index) * p.capacity + k);
    }
    p.mass[q.index * p.capacity + k] = total;
  }
  int tracked = 0;
  for (int i = static_cast<int>(threadIdx.x); i < q.num_tracked; i += kNumThreads) {
    tracked += p.rows[q.begin + i] >= 0 ? 1 : 0;
  }
  const double num_tracked = block_sum(static_cast<double>(tracked), reduced);
  double total = 0.0;
  const int num_keys = q.end_key - q.first_key;
  if (num_keys > 0) {
    const int first = q.first_key / kBlockKeys, count = (q.end_key - 1) / kBlockKeys - first + 1;
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < q.num_tracked * count; i += kNumThreads) {
      const int64_t at = int64_t{q.first_tracked + i / count} * num_blocks + first + i % count;
      if (p.rows[q.begin + i / count] >= 0) total += __ldcg(cosines + at);
    }
  }
  total = block_sum(total, reduced);
  if (threadIdx.x != 0) return;
  const bool has_any = num_tracked > 0.0 && num_keys > 0;
  const double mean = has_any ? total / (num_tracked * num_keys) : INFINITY;
  p.similarity[q.index] = q.fits ? mean : NAN;
}

// blockIdx.y: tracked rows y, y + rows_per_pass, ...; the last kMassParts add the window's weights.
__global__ void __launch_bounds__(kNumThreads, 4)
    drift_statistics_kernel(const DriftAttentionParams p, const DriftParts d, double* cosines,
                            float* masses) {
  __shared__ float3 shared[kNumWarps][kWarpSize];
  __shared__ double reduced[kNumWarps];
  __shared__ bool is_last;
  wait_for_previous();
  const Sequence q(p, d, static_cast<int>(blockIdx.z));
  const int num_blocks = static_cast<int>(gridDim.x);
  const int rows_per_pass = static_cast<int>(gridDim.y) - kMassParts;
  const int part = static_cast<int>(blockIdx.y) - rows_per_pass;
  const int first = static_cast<int>(blockIdx.x) * kBlockKeys;
  const int position = first + static_cast<int>(threadIdx.x) % kWarpSize;
  const bool is_valid = position >= q.first_key && position < q.end_key;
  if (part >= 0) {
    const float mine = is_valid ? add_window(p, d, q, part, position) : 0.0f;
    const float mass = add_warps(make_float3(mine, 0.0f, 0.0f), shared).x;
    if (threadIdx.x < kWarpSize && position < p.capacity) {
      masses[(part * p.num_sequences + q.index) * p.capacity + position] = mass;
    }
  }
  const bool has_any = max(q.first_key, first) < min(q.end_key, first + kBlockKeys);
  const int first_row = part >= 0 || !has_any ? q.num_tracked : static_cast<int>(blockIdx.y);
  for (int i = first_row; i < q.num_tracked; i += rows_per_pass) {
    float3 sums = make_float3(0.0f, 0.0f, 0.0f);
    if (is_valid) sums = compare(p, d, q, i, position);
    sums = add_warps(sums, shared);
    const float before = fmaxf(sqrtf(sums.y), kMinNorm), now = fmaxf(sqrtf(sums.z), kMinNorm);
    const double total = warp_reduce(double{sums.x / (before * now)}, Sum{});
    if (p.rows[q.begin + i] < 0) continue;
    if (threadIdx.x == 0) cosines[int64_t{q.first_tracked + i} * num_blocks + blockIdx.x] = total;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(d.finished + q.index, 1u) == gridDim.x * gridDim.y - 1;
    __threadfence();
  }
  __syncthreads();
  if (is_last) finish(p, cosines, masses, num_blocks, q, reduced);
}

}  // namespace elastic_cache::cuda::drift
