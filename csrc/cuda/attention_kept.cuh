// What drift_attention's part kernel does beside the attention: it keeps scores, and computes those
// of tracked rows as they were. Old queries must not see the keys written since: those are left out
// of the tiles of the cache, and the last part of the keys takes them from k_old instead.
#pragma once

#include "attention_tile.cuh"

namespace elastic_cache::cuda::attention {

// The lanes of this block's tracked rows as they were: their queries, and where their results go.
template <int D>
__device__ inline void copy_old_queries(const WindowAttentionParams& p, const DriftParts& drift,
                                        const LaneMap& lanes, OldShared<D>& old) {
  constexpr int kVectors = D / 8;
  const int first = static_cast<int>(blockIdx.x) * kOldLanes;
  const auto* queries = static_cast<const bf16*>(drift.q_old);
  for (int at = static_cast<int>(threadIdx.x); at < kOldLanes * kVectors; at += kNumThreads) {
    const int i = at / kVectors, column = at % kVectors * 8;
    const TrackedRow tracked = drift.tracked_row(p, lanes.row(first + i));
    const int64_t from =
        tracked.row < 0 ? 0 : (int64_t{tracked.row} * p.num_heads + lanes.head(first + i)) * D;
    copy_async(&old.queries[i][column], queries + from + column, tracked.row >= 0);
    if (column != 0) continue;
    old.sequences[i] = tracked.row < 0 ? -1 : tracked.sequence;
    old.items[i] = static_cast<int32_t>(lanes.item(first + i));
  }
}

template <int D>
__device__ inline void clear_old(OldShared<D>& old) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < kOldLanes * kNumWarps; i += kNumThreads) {
    old.max[i / kOldLanes][i % kOldLanes] = -INFINITY;
    old.sum[i / kOldLanes][i % kOldLanes] = 0.0f;
  }
}

// Keeps the scores of window and tracked rows, to base 2; `first` is the position of the tile.
template <int D, int M>
__device__ inline void keep_scores(const WindowAttentionParams& p, const DriftParts& drift,
                                   const PartShared<D, M, true>& sh, int sequence, int first,
                                   int count, const Scores<M>& score) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
#pragma unroll
  for (int m = 0; m < M / 16; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m * 16 + half * 8 + lane / 4;
      if (sh.scored_items[row] < 0 || sh.sequences[row] != sequence) continue;
      float* to = drift.scores + sh.scored_items[row] * p.capacity + first;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = warp * kKeysPerWarp + i / 2 * 8 + lane % 4 * 2 + i % 2;
        if (key < count) to[key] = score[m][i / 2][half * 2 + i % 2];
      }
    }
  }
}

// Scores of the old lanes against a tile of keys; `place` gives a key's position, or -1 for one
// that is not theirs. Only this warp touches its maxima and sums.
template <int D, int M, class Place>
__device__ inline void score_old(const WindowAttentionParams& p, const DriftParts& drift,
                                 PartShared<D, M, true>& sh, int buffer, int sequence, float factor,
                                 const Place& place) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  OldShared<D>& old = sh.old;
  Scores<kOldLanes> score;
  score_tile<D, kOldLanes>(sh.keys[buffer], old.queries, score);
  int position[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    position[i] = place(warp * kKeysPerWarp + i / 2 * 8 + lane % 4 * 2 + i % 2);
  }
#pragma unroll
  for (int m = 0; m < kOldLanes / 16; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m * 16 + half * 8 + lane / 4;
      const bool is_mine = old.sequences[row] == sequence;
      float* to = drift.old_scores + (is_mine ? old.items[row] * p.capacity : 0);
      float top = old.max[warp][row], total = 0.0f;
      const float before = top;
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i] = position[i] < 0 ? -INFINITY : __fmul_rn(score[m][i / 2][half * 2 + i % 2], factor);
        if (is_mine && position[i] >= 0) to[position[i]] = x[i];
        top = fmaxf(top, x[i]);
      }
      top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 2));
#pragma unroll
      for (int i = 0; i < 4; ++i) total += position[i] < 0 ? 0.0f : exp2f(x[i] - top);
      total += __shfl_xor_sync(kFullWarp, total, 1);
      total += __shfl_xor_sync(kFullWarp, total, 2);
      if (lane % 4 == 0 && top != -INFINITY) {
        old.sum[warp][row] = old.sum[warp][row] * exp2f(before - top) + total;
        old.max[warp][row] = top;
      }
    }
  }
}

// The keys as they were, of the rows that overwrote them. Contains barriers; no copy is under way.
template <int D, int M>
__device__ inline void score_overwritten(const WindowAttentionParams& p, const DriftParts& drift,
                                         PartShared<D, M, true>& sh, int sequence, float factor) {
  const int2 rows = drift.rows_of(sequence);
  const int kv_head = static_cast<int>(blockIdx.z);
  const int64_t stride = p.num_kv_heads * D;
  const int first_key = p.key_range[2 * sequence], end_key = p.key_range[2 * sequence + 1];
  for (int first = rows.x; first < rows.y; first += kTileKeys) {
    const auto* from = static_cast<const bf16*>(drift.k_old) + first * stride + kv_head * D;
    copy_tile<D>(sh.keys[0], from, stride, rows.y - first);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    score_old(p, drift, sh, 0, sequence, factor, [&](int key) {
      const int slot = first + key < rows.y ? p.rows[first + key] : -1;
      const int at = slot - sequence * static_cast<int>(p.capacity);
      return slot >= 0 && at >= first_key && at < end_key ? at : -1;
    });
    __syncthreads();
  }
}

// Old lanes of `sequence` -> parts. Begins with a barrier.
template <int D>
__device__ inline void write_old_part(const WindowAttentionParams& p, const DriftParts& drift,
                                      int sequence, int split, const OldShared<D>& old) {
  __syncthreads();
  const int i = static_cast<int>(threadIdx.x);
  if (i >= kOldLanes || old.sequences[i] != sequence) return;
  float2 all = make_float2(old.max[0][i], old.sum[0][i]);
  for (int w = 1; w < kNumWarps; ++w) all = join(all, make_float2(old.max[w][i], old.sum[w][i]));
  drift.old_softmax[split * drift.max_tracked * p.num_heads + old.items[i]] = all;
}

// Which of a tile's keys, given by its first position, were overwritten: a bit a key. Every warp
// finds out for itself.
__device__ inline uint64_t find_overwritten(const WindowAttentionParams& p, const DriftParts& drift,
                                            int sequence, int first) {
  const int2 rows = drift.rows_of(sequence);
  const int start = sequence * static_cast<int>(p.capacity) + first;
  uint64_t mask = 0;
  for (int r = rows.x + static_cast<int>(threadIdx.x) % kWarpSize; r < rows.y; r += kWarpSize) {
    const int key = p.rows[r] < 0 ? -1 : p.rows[r] - start;
    if (key >= 0 && key < kTileKeys) mask |= uint64_t{1} << key;
  }
  const uint32_t low = __reduce_or_sync(kFullWarp, static_cast<uint32_t>(mask));
  const uint32_t high = __reduce_or_sync(kFullWarp, static_cast<uint32_t>(mask >> 32));
  return uint64_t{high} << 32 | low;
}

}  // namespace elastic_cache::cuda::attention
