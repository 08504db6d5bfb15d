// The comparison that follows cluster_attention.cu: probabilities, old and new -> similarity; the
// heads' masses -> mass. A block takes 64 keys of a tracked row, two a thread of a warp, and a warp
// every fourth chunk of eight heads; the blocks of one more row add the masses in the same way.
// The subtle thing is latency: where a tracked row's probabilities lie follows from its number, so
// that they are all on their way before anything is known of the sequence. What turns out to be no
// tracked row or no key is not counted.
#pragma once

#include "cluster_attention.h"
#include "common/heuristics.h"
#include "common/reduce.cuh"
#include "drift_attention_finish.cuh"

namespace elastic_cache::cuda::cluster {

constexpr int kCompareWarps = 4;
constexpr int kCompareHeads = 8;
constexpr int kCompareThreads = kCompareWarps * kWarpSize;
static_assert(kCompareKeys == 2 * kWarpSize, "a thread has two keys");

// Sums over heads at a thread's two keys.
struct CompareSums {
  float2 dot, old, recent;
};

__device__ inline void add_product(float2& sum, float2 a, float2 b) {
  sum.x += a.x * b.x;
  sum.y += a.y * b.y;
}

// Two numbers of each of eight heads (zero beyond the last), `stride` apart.
__device__ inline void load_heads(const float* from, int64_t stride, int first, int num_heads,
                                  float2 (&x)[kCompareHeads]) {
#pragma unroll
  for (int i = 0; i < kCompareHeads; ++i) {
    const bool is_head = first + i < num_heads;
    x[i] = is_head ? *reinterpret_cast<const float2*>(from + (first + i) * stride)
                   : make_float2(0.0f, 0.0f);
  }
}

// This warp's heads of a tracked row, at keys `key` and `key` + 1 of the range.
__device__ inline CompareSums compare_heads(const DriftAttentionParams& p, const Workspace& w,
                                            int64_t tracked, int key) {
  CompareSums sums{};
  const int num_heads = static_cast<int>(p.num_heads);
  const int64_t start = tracked * num_heads * w.stride + key;
  for (int first = static_cast<int>(threadIdx.x) / kWarpSize * kCompareHeads; first < num_heads;
       first += kCompareWarps * kCompareHeads) {
    float2 old[kCompareHeads], recent[kCompareHeads];
    load_heads(w.old + start, w.stride, first, num_heads, old);
    load_heads(w.recent + start, w.stride, first, num_heads, recent);
#pragma unroll
    for (int i = 0; i < kCompareHeads; ++i) {
      add_product(sums.dot, old[i], recent[i]);
      add_product(sums.old, old[i], old[i]);
      add_product(sums.recent, recent[i], recent[i]);
    }
  }
  return sums;
}

// Positions are met once each if they are counted from the first of the range on, and around.
__device__ inline void add_masses(const DriftAttentionParams& p, const Workspace& w, int s,
                                  int first_index, float (&sums)[kCompareWarps][kCompareKeys]) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int key = static_cast<int>(threadIdx.x) % kWarpSize * 2;
  const int num_heads = static_cast<int>(p.num_kv_heads), capacity = static_cast<int>(p.capacity);
  const int first_key = p.key_range[2 * s], end_key = p.key_range[2 * s + 1];
  const int64_t stride = p.num_sequences * w.stride;
  const float* from = w.mass + int64_t{s} * w.stride + first_index + key;
  float2 sum = make_float2(0.0f, 0.0f);
  for (int first = warp * kCompareHeads; first < num_heads && first_index + key < w.stride;
       first += kCompareWarps * kCompareHeads) {
    float2 x[kCompareHeads];
    load_heads(from, stride, first, num_heads, x);
#pragma unroll
    for (int i = 0; i < kCompareHeads; ++i) sum.x += x[i].x, sum.y += x[i].y;
  }
  sums[warp][key] = sum.x, sums[warp][key + 1] = sum.y;
  __syncthreads();
  const int mine = static_cast<int>(threadIdx.x), index = first_index + mine;
  if (mine >= kCompareKeys || index >= capacity) return;
  float total = 0.0f;
  for (int i = 0; i < kCompareWarps; ++i) total += sums[i][mine];
  const int position =
      first_key + index < capacity ? first_key + index : first_key + index - capacity;
  p.mass[int64_t{s} * capacity + position] = index < end_key - first_key ? total : 0.0f;
}

// blockIdx.y: tracked rows y, y + rows_per_pass, ...; the last one adds masses.
__global__ void __launch_bounds__(kCompareThreads)
    drift_cluster_compare_kernel(const __grid_constant__ DriftAttentionParams p,
                                 const __grid_constant__ Workspace w) {
  __shared__ float sums[3][kCompareWarps][kCompareKeys];
  __shared__ double reduced[kCompareWarps];
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarpSize, key = thread % kWarpSize * 2;
  const int first_index = static_cast<int>(blockIdx.x) * kCompareKeys;
  const int s = static_cast<int>(blockIdx.z), rows_per_pass = static_cast<int>(gridDim.y) - 1;
  if (static_cast<int>(blockIdx.y) == rows_per_pass) {
    add_masses(p, w, s, first_index, sums[0]);
    return;
  }
  const drift::Sequence q(p, w.max_tracked, s);
  const int num_keys = q.end_key - q.first_key;
  for (int i = static_cast<int>(blockIdx.y); q.first_tracked + i < w.max_tracked;
       i += rows_per_pass) {
    CompareSums mine{};
    const bool has_room = first_index + key < w.stride;
    if (has_room) mine = compare_heads(p, w, q.first_tracked + i, first_index + key);
    if (i >= q.num_tracked) break;
    sums[0][warp][key] = mine.dot.x, sums[0][warp][key + 1] = mine.dot.y;
    sums[1][warp][key] = mine.old.x, sums[1][warp][key + 1] = mine.old.y;
    sums[2][warp][key] = mine.recent.x, sums[2][warp][key + 1] = mine.recent.y;
    __syncthreads();
    float cosine = 0.0f;
    if (thread < kCompareKeys && first_index + thread < num_keys) {
      float total[3] = {};
      for (int j = 0; j < 3; ++j) {
        for (int other = 0; other < kCompareWarps; ++other) total[j] += sums[j][other][thread];
      }
      cosine = drift::cosine(total[0], total[1], total[2]);
    }
    const double sum = block_sum(static_cast<double>(cosine), reduced);
    if (thread == 0) {
      w.cosines[int64_t{q.first_tracked + i} * w.num_key_blocks + blockIdx.x] = sum;
    }
  }
  const int count = (num_keys + kCompareKeys - 1) / kCompareKeys;
  drift::finish(p, q, {w.cosines, w.num_key_blocks, 0, count}, w.finished, reduced);
}

}  // namespace elastic_cache::cuda::cluster
