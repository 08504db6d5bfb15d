// What the forms of attention's part kernel share: how lanes and keys are cut, and what a part is.
#pragma once

#include <climits>
#include <cmath>

#include "common/heuristics.h"
#include "common/launch.h"
#include "common/reduce.cuh"
#include "common/vector.cuh"
#include "elastic_cache/window_attention.h"

namespace elastic_cache::cuda::attention {

constexpr int kNoSequence = INT_MAX;
constexpr float kLn2 = 0.69314718055994530942f;

// What the part kernel leaves for the combining one; an item is row * H + head.
struct Parts {
  float* out;       // [splits, R * H, D]; not written where the maximum is -infinity
  float2* softmax;  // [splits, R * H] maximum (base 2) and sum
  int num_splits;
};

// Log-sum-exp, of a maximum (base 2) and a sum relative to it.
__device__ inline float log_sum(float max, float sum) { return (max + log2f(sum)) * kLn2; }

struct KeySpan {
  int begin;
  int end;
};

__device__ inline KeySpan keys_of(const int32_t* key_range, int sequence) {
  return {key_range[2 * sequence], key_range[2 * sequence + 1]};
}

// Tiles of a sequence's keys are shared out evenly over the splits.
__device__ inline KeySpan split_keys(const KeySpan& keys, int split, int num_splits) {
  if (num_splits == 1) return keys;  // spares two divisions, for which keys would wait
  const int tiles = (max(keys.end - keys.begin, 0) + kTileKeys - 1) / kTileKeys;
  const auto tile = [&](int i) { return tiles * i / num_splits; };
  return {keys.begin + tile(split) * kTileKeys,
          min(keys.begin + tile(split + 1) * kTileKeys, keys.end)};
}

// Lane of a key/value head -> row (R or beyond: none), item, and sequence (-1: skip).
struct LaneMap {
  int group;
  int num_rows;
  int num_heads;
  int first_head;

  __device__ LaneMap(const WindowAttentionParams& p, int kv_head)
      : group(static_cast<int>(p.num_heads) / static_cast<int>(p.num_kv_heads)),
        num_rows(static_cast<int>(p.num_rows)),
        num_heads(static_cast<int>(p.num_heads)),
        first_head(kv_head * group) {}
  __device__ int num_lanes() const { return num_rows * group; }
  __device__ int row(int lane) const { return lane / group; }
  __device__ int head(int lane) const { return first_head + lane % group; }
  __device__ int64_t item(int lane) const { return int64_t{row(lane)} * num_heads + head(lane); }
  __device__ int slot(const WindowAttentionParams& p, int lane) const {
    return row(lane) < num_rows ? p.rows[row(lane)] : -1;
  }
  __device__ int sequence(const WindowAttentionParams& p, int lane) const {
    const int at = slot(p, lane);
    return at < 0 ? -1 : at / static_cast<int>(p.capacity);
  }
};

// The smallest of `sequences` above `after`; every warp finds it for itself.
__device__ inline int next_sequence(const int32_t* sequences, int count, int after) {
  int best = kNoSequence;
  for (int i = static_cast<int>(threadIdx.x) % kWarpSize; i < count; i += kWarpSize) {
    if (sequences[i] > after) best = min(best, sequences[i]);
  }
  return __reduce_min_sync(kFullWarp, best);
}

}  // namespace elastic_cache::cuda::attention
