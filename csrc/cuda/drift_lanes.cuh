// What the kernels of drift_statistics share. They take a sequence's rows in passes: a pass has 16
// window rows, 16 tracked rows, and the same tracked rows as they were, 48 lanes of every head.
#pragma once

#include <cmath>

#include "common/launch.h"
#include "common/reduce.cuh"
#include "common/vector.cuh"
#include "elastic_cache/drift_statistics.h"

namespace elastic_cache::cuda::drift {

constexpr float kMinNorm = 1e-8f;

constexpr int kPassRows = 16;
constexpr int kWindowLanes = 0;  // first lane of a kind
constexpr int kTrackedLanes = kPassRows;
constexpr int kOldLanes = 2 * kPassRows;
constexpr int kLanes = 3 * kPassRows;

// What the first kernel leaves for the others.
struct Layout {
  float* lse;       // [L, S, passes, H, kLanes] to base 2; +infinity for a lane without a row
  double* cosines;  // [L, S, key blocks] sums over tracked rows and keys
  int num_passes;   // room for
  int num_blocks;
};

// A sequence of a layer: its rows and keys. Tracked rows are begin .. begin + num_tracked - 1.
struct Sequence {
  int index;
  int begin;
  int end;
  int num_tracked;
  int window;
  int num_window;
  int first_key;
  int end_key;
  int first_slot;
  int group;             // query heads of a key/value head
  int64_t first_cached;  // of the caches' slots, this layer's and sequence's first
  int64_t first_old;     // of the rows of q_old, k_old and lse, this layer's first

  __device__ Sequence(const DriftStatisticsParams& p, int layer, int s) : index(s) {
    const int32_t* segment = p.segments + s * kSegmentColumns;
    begin = segment[kSegmentBegin];
    num_tracked = segment[kSegmentTracked];
    window = begin + num_tracked + segment[kSegmentCommitted];
    num_window = segment[kSegmentWindow];
    end = window + num_window + segment[kSegmentLookahead];
    first_key = p.key_range[2 * s];
    end_key = max(p.key_range[2 * s + 1], first_key);
    first_slot = s * static_cast<int>(p.capacity);
    group = static_cast<int>(p.num_heads) / static_cast<int>(p.num_kv_heads);
    first_cached = (int64_t{layer} * p.num_sequences + s) * p.capacity;
    first_old = int64_t{layer} * p.num_old_rows;
  }
  __device__ int num_passes() const {
    return (max(num_window, num_tracked) + kPassRows - 1) / kPassRows;
  }
  // Position of a row, -1 for one that is skipped.
  __device__ int position(const DriftStatisticsParams& p, int row) const {
    const int slot = p.rows[row];
    return slot < 0 ? -1 : slot - first_slot;
  }
  // The row of a pass's lane, -1 for none.
  __device__ int row(const DriftStatisticsParams& p, int pass, int lane) const {
    const int i = pass * kPassRows + lane % kPassRows;
    const bool is_window = lane < kTrackedLanes;
    if (i >= (is_window ? num_window : num_tracked)) return -1;
    const int at = (is_window ? window : begin) + i;
    return p.rows[at] < 0 ? -1 : at;
  }
  // Which row of q_cache or q_old holds the query of a lane, whose row must be one.
  __device__ int64_t query(const DriftStatisticsParams& p, int lane, int row) const {
    return lane < kOldLanes ? first_cached + position(p, row) : first_old + row;
  }
};

// The log-sum-exp of a present lane, to base 2, as window_attention gave it.
__device__ inline float given_log_sum(const DriftStatisticsParams& p, const Sequence& q, int row,
                                      int head) {
  return row < 0 ? INFINITY : p.lse[(q.first_old + row) * p.num_heads + head] * kLog2E;
}

__device__ inline int64_t lse_index(const DriftStatisticsParams& p, const Layout& layout, int layer,
                                    int sequence, int pass, int head) {
  const int64_t at = (int64_t{layer} * p.num_sequences + sequence) * layout.num_passes + pass;
  return (at * p.num_heads + head) * kLanes;
}

// Maximum and sum of 2^(x - maximum) over some keys; no key: -infinity.
struct Softmax {
  float top = -INFINITY;
  float sum = 0.0f;

  __device__ void add(const Softmax& other) {
    const float both = fmaxf(top, other.top);
    if (both == -INFINITY) return;
    sum = sum * exp2_flush(top - both) + other.sum * exp2_flush(other.top - both);
    top = both;
  }
  __device__ void add_lane(int offset) {
    add({__shfl_xor_sync(kFullWarp, top, offset), __shfl_xor_sync(kFullWarp, sum, offset)});
  }
  __device__ float log_sum() const { return top + log2f(sum); }
};

// old * new, old * old and new * new over the heads, of a tracked row and a key.
struct Products {
  float dot = 0.0f, old_square = 0.0f, new_square = 0.0f;

  __device__ void add(float before, float now) {
    dot += before * now;
    old_square += before * before;
    new_square += now * now;
  }
  __device__ float cosine() const {
    return dot / (fmaxf(sqrtf(old_square), kMinNorm) * fmaxf(sqrtf(new_square), kMinNorm));
  }
};

}  // namespace elastic_cache::cuda::drift
