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
  const bool is_even = p.capacity % 2 == 0 && first % 2 == 0;  // pairs are then aligned
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
      for (int n = 0; n < 2; ++n) {
        const int key = warp * kKeysPerWarp + n * 8 + lane % 4 * 2;
        const float x = score[m][n][half * 2], y = score[m][n][half * 2 + 1];
        if (is_even && key + 1 < count) {
          *reinterpret_cast<float2*>(to + key) = make_float2(x, y);
        } else {
          if (key < count) to[key] = x;
          if (key + 1 < count) to[key + 1] = y;
        }
      }
    }
  }
}

// Scores of the old lanes against a tile of keys; `place` gives a key's position, or -1 for one
// that is not theirs. Only this warp touches its maxima and sums.
template <int D, int M, class Place>
__device__ inline void score_old(const WindowAttentionParams& p, const DriftParts& drift,
                                 PartShared<D, M, true>& sh, int buffer, int count, int sequence,
                                 float factor, const Place& place) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  OldShared<D>& old = sh.old;
  if (warp * kKeysPerWarp >= count) return;
  Scores<kOldLanes> score;
  score_tile<D, kOldLanes>(sh.keys[buffer], old.queries, score);
  int position[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    position[i] = place(warp * kKeysPerWarp + i / 2 * 8 + lane % 4 * 2 + i % 2);
  }
#pragma unroll
  for (int m = 0; m < kOldLanes / 16; ++m) {
    if (!__any_sync(kFullWarp, old.sequences[m * 16 + lane % 16] == sequence)) continue;
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

// Rows of a sequence, and the slots of the first of them: a lane keeps every 32nd.
struct SequenceRows {
  static constexpr int kKept = 4;
  int begin;
  int end;
  int slots[kKept];

  __device__ void load(const WindowAttentionParams& p, const DriftParts& drift, int sequence) {
    const int2 rows = drift.rows_of(sequence);
    begin = rows.x, end = rows.y;
#pragma unroll
    for (int i = 0; i < kKept; ++i) slots[i] = slot(p, i);
  }
  // Which of a tile's keys, the first of them at a slot, were overwritten: a bit a key. Every warp
  // finds out for itself.
  __device__ uint64_t overwritten(const WindowAttentionParams& p, int first_slot) const {
    uint64_t mask = 0;
#pragma unroll
    for (int i = 0; i < kKept; ++i) mask |= bit(slots[i] - first_slot, slots[i]);
    for (int i = kKept; begin + i * kWarpSize < end; ++i) {
      const int at = slot(p, i);
      mask |= bit(at - first_slot, at);
    }
    const uint32_t low = __reduce_or_sync(kFullWarp, static_cast<uint32_t>(mask));
    const uint32_t high = __reduce_or_sync(kFullWarp, static_cast<uint32_t>(mask >> 32));
    return uint64_t{high} << 32 | low;
  }
  // The share of the rows whose keys as they were a split takes.
  __device__ int2 share(int split, int num_splits) const {
    const int each = (end - begin + num_splits - 1) / num_splits;
    const int first = min(begin + split * each, end);
    return make_int2(first, min(first + each, end));
  }

 private:
  __device__ int slot(const WindowAttentionParams& p, int i) const {
    const int row = begin + i * kWarpSize + static_cast<int>(threadIdx.x) % kWarpSize;
    return row < end ? p.rows[row] : -1;
  }
  __device__ static uint64_t bit(int key, int slot) {
    return slot >= 0 && key >= 0 && key < kTileKeys ? uint64_t{1} << key : 0;
  }
};

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

}  // namespace elastic_cache::cuda::attention
