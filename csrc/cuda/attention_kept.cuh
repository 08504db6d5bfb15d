// What drift_attention's part kernel does beside the attention: it keeps scores, and computes those
// of tracked rows as they were. Old queries must not see the keys written since: those are left out
// of the tiles of the cache, and taken from k_old in tiles of their own, a share for every split.
#pragma once

#include "attention_tile.cuh"

namespace elastic_cache::cuda::attention {

// The lanes of this block's tracked rows as they were: their queries, and where their results go.
template <int D>
__device__ inline void copy_old_queries(const WindowAttentionParams& p, const DriftParts& drift,
                                        const LaneMap& lanes, OldShared<D>& old) {
  constexpr int kThreadsPerLane = kNumThreads / kOldLanes;
  const int i = static_cast<int>(threadIdx.x) / kThreadsPerLane;
  const int thread = static_cast<int>(threadIdx.x) % kThreadsPerLane;
  const int lane = static_cast<int>(blockIdx.x) * kOldLanes + i;
  const TrackedRow tracked = drift.tracked_row(p, lanes.row(lane));
  const bool is_valid = tracked.row >= 0;
  const int64_t from = is_valid ? (int64_t{tracked.row} * p.num_heads + lanes.head(lane)) * D : 0;
  const auto* query = static_cast<const bf16*>(drift.q_old) + from;
#pragma unroll
  for (int column = thread * 8; column < D; column += kThreadsPerLane * 8) {
    copy_async(&old.queries[i / 16][i % 16][column], query + column, is_valid);
  }
  if (thread != 0) return;
  old.sequences[i / 16][i % 16] = is_valid ? tracked.sequence : -1;
  old.items[i / 16][i % 16] = static_cast<int32_t>(lanes.item(lane));
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

// Keeps the scores of the old lanes against a tile of `count` keys; `place` gives a key's position,
// or -1 for one that is not theirs.
template <int D, int M, class Place>
__device__ inline void score_old(const WindowAttentionParams& p, const DriftParts& drift,
                                 const PartShared<D, M, true>& sh, int buffer, int count,
                                 int sequence, float factor, const Place& place) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const OldShared<D>& old = sh.old;
  if (warp * kKeysPerWarp >= count) return;
  int position[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    position[i] = place(warp * kKeysPerWarp + i / 2 * 8 + lane % 4 * 2 + i % 2);
  }
#pragma unroll
  for (int m = 0; m < kOldLanes / 16; ++m) {
    if (!__any_sync(kFullWarp, old.sequences[m][lane % 16] == sequence)) continue;
    Scores<16> score;
    score_tile<D, 16>(sh.keys[buffer], old.queries[m], score);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = half * 8 + lane / 4;
      if (old.sequences[m][row] != sequence) continue;
      float* to = drift.old_scores + old.items[m][row] * p.capacity;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = __fmul_rn(score[0][i / 2][half * 2 + i % 2], factor);
        if (position[i] >= 0) to[position[i]] = x;
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

}  // namespace elastic_cache::cuda::attention
