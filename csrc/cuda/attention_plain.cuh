// The plain form of attention's part kernel, for any dtype and any even head_dim: a warp a lane, a
// thread a key. It is the kernel to read first, and the one float32 uses.
#pragma once

#include "attention_parts.cuh"

namespace elastic_cache::cuda::attention {

constexpr int kPlainLanes = 8;

// A warp's lane: its query and what it is. Blocks from `num_blocks` on take tracked rows as they
// were; for those `row` is the tracked row's number.
template <bool kDrift>
struct PlainLane {
  bool is_old;
  int sequence;  // -1: skip
  int row;
  int head;
  int64_t query;  // where its query begins

  __device__ PlainLane(const WindowAttentionParams& p, const DriftParts& drift,
                       const LaneMap& lanes, int num_blocks, int warp) {
    const int block = static_cast<int>(blockIdx.x);
    is_old = kDrift && block >= num_blocks;
    const int lane = (is_old ? block - num_blocks : block) * kPlainLanes + warp;
    row = lanes.row(lane);
    head = lanes.head(lane);
    int from = 0;
    if (kDrift && is_old) {
      const TrackedRow tracked = drift.tracked_row(p, row);
      sequence = tracked.row < 0 ? -1 : tracked.sequence;
      from = tracked.row;
    } else {
      sequence = lanes.sequence(p, lane);
      from = lanes.slot(p, lane);
    }
    query = (int64_t{sequence < 0 ? 0 : from} * lanes.num_heads + head) * p.head_dim;
  }
  __device__ int64_t item(const WindowAttentionParams& p) const {
    return int64_t{row} * p.num_heads + head;
  }
};

// The row that overwrote a slot, or -1.
__device__ inline int overwriting_row(const WindowAttentionParams& p, const int2& rows,
                                      int64_t slot) {
  for (int r = rows.x; r < rows.y; ++r) {
    if (p.rows[r] == slot) return r;
  }
  return -1;
}

// query . key of the keys as they were, at a slot of the cache.
template <class T>
__device__ float old_product(const WindowAttentionParams& p, const DriftParts& drift,
                             const float* query, int sequence, int64_t slot, int kv_head) {
  const int row = overwriting_row(p, drift.rows_of(sequence), slot);
  const auto* cache = static_cast<const T*>(row < 0 ? p.k_cache : drift.k_old);
  const T* key = cache + ((row < 0 ? slot : row) * p.num_kv_heads + kv_head) * p.head_dim;
  float product = 0.0f;
  for (int d = 0; d < static_cast<int>(p.head_dim); ++d) product += query[d] * to_float(key[d]);
  return product;
}

// Keys and values begin .. begin + count - 1 of a sequence into shared memory. Contains barriers.
template <class T>
__device__ void stage(const WindowAttentionParams& p, int64_t first_slot, int count, int kv_head,
                      float* keys, float* values) {
  const int dim = static_cast<int>(p.head_dim);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < count * dim; i += static_cast<int>(blockDim.x)) {
    const int key = i / dim, d = i % dim;
    const int64_t at = ((first_slot + key) * p.num_kv_heads + kv_head) * dim + d;
    keys[key * (dim + 1) + d] = to_float(static_cast<const T*>(p.k_cache)[at]);
    values[key * dim + d] = to_float(static_cast<const T*>(p.v_cache)[at]);
  }
  __syncthreads();
}

template <class T, bool kDrift>
__global__ void __launch_bounds__(kPlainLanes* kWarpSize, 2)
    attention_plain_part_kernel(const WindowAttentionParams p, const Parts parts,
                                const DriftParts drift, int num_blocks) {
  extern __shared__ float plain_memory[];
  __shared__ int32_t sequences[kPlainLanes];
  __shared__ float weights[kPlainLanes][kWarpSize];
  wait_for_previous();
  if constexpr (kDrift) drift.begin();
  const int dim = static_cast<int>(p.head_dim);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  float* keys = plain_memory;                    // [32, D + 1]
  float* values = keys + kWarpSize * (dim + 1);  // [32, D]
  float* query = values + kWarpSize * dim + warp * 2 * dim;
  float* out = query + dim;
  const int split = static_cast<int>(blockIdx.y), kv_head = static_cast<int>(blockIdx.z);
  const PlainLane<kDrift> mine(p, drift, LaneMap(p, kv_head), num_blocks, warp);
  if (lane == 0) sequences[warp] = mine.sequence;
  const T* from = static_cast<const T*>(mine.is_old ? drift.q_old : p.q_cache) + mine.query;
  for (int d = lane; d < dim; d += kWarpSize) {
    query[d] = mine.sequence < 0 ? 0.0f : to_float(from[d]);
  }
  __syncthreads();

  const float factor = p.scale * kLog2E;
  for (int sequence = next_sequence(sequences, kPlainLanes, -1); sequence != kNoSequence;
       sequence = next_sequence(sequences, kPlainLanes, sequence)) {
    const bool is_mine = sequences[warp] == sequence;
    const bool is_kept = kDrift && is_mine && (mine.is_old || drift.is_kept(sequence, mine.row));
    float* kept = kDrift && mine.is_old ? drift.old_scores : drift.scores;
    const KeySpan span = split_keys(p.key_range, sequence, split, parts.num_splits);
    float top = -INFINITY, sum = 0.0f;
    for (int d = lane; d < dim; d += kWarpSize) out[d] = 0.0f;
    for (int begin = span.begin; begin < span.end; begin += kWarpSize) {
      const int count = min(span.end - begin, kWarpSize);
      const int64_t first_slot = sequence * p.capacity + begin;
      stage<T>(p, first_slot, count, kv_head, keys, values);
      float score = -INFINITY;
      if (lane < count) {
        score = 0.0f;
        if (kDrift && mine.is_old && is_mine) {
          score = old_product<T>(p, drift, query, sequence, first_slot + lane, kv_head);
        } else {
          for (int d = 0; d < dim; ++d) score += query[d] * keys[lane * (dim + 1) + d];
        }
        score *= factor;
        if (is_kept) kept[mine.item(p) * p.capacity + begin + lane] = score;
      }
      const float before = top;
      top = fmaxf(top, warp_reduce(score, [](float a, float b) { return fmaxf(a, b); }));
      const float rescale = exp2f(before - top), weight = exp2f(score - top);
      sum = sum * rescale + warp_reduce(weight, Sum{});
      weights[warp][lane] = weight;
      __syncwarp();
      for (int d = lane; d < dim && !(kDrift && mine.is_old); d += kWarpSize) {
        float total = out[d] * rescale;
        for (int key = 0; key < count; ++key) total += weights[warp][key] * values[key * dim + d];
        out[d] = total;
      }
      __syncwarp();
    }
    if (!is_mine || (kDrift && mine.is_old)) continue;
    const int64_t item = split * p.num_rows * p.num_heads + mine.item(p);
    if (lane == 0) parts.softmax[item] = make_float2(top, sum);
    for (int d = lane; d < dim && sum > 0.0f; d += kWarpSize) parts.out[item * dim + d] = out[d];
  }
}

}  // namespace elastic_cache::cuda::attention
