// What both forms of window_attention's part kernel share: how lanes and keys are cut, what a part
// is; and the plain form, for any dtype and any even head_dim: a warp a lane, a thread a key.
// It is the kernel to read first, and the one float32 uses.
#pragma once

#include <climits>
#include <cmath>

#include "common/heuristics.h"
#include "common/reduce.cuh"
#include "common/vector.cuh"
#include "elastic_cache/window_attention.h"

namespace elastic_cache::cuda::attention {

constexpr int kTileKeys = kAttentionTileKeys;
constexpr float kLog2E = 1.44269504088896340736f;
constexpr int kNoSequence = INT_MAX;

// What the part kernel leaves for the combining one; an item is row * H + head.
struct Parts {
  float* out;       // [splits, R * H, D]; not written where the maximum is -infinity
  float2* softmax;  // [splits, R * H] maximum (base 2) and sum
  int num_splits;
};

// Tiles of a sequence's keys are shared out evenly over the splits.
struct KeySpan {
  int begin;
  int end;
};

__device__ inline KeySpan split_keys(const int32_t* key_range, int sequence, int split,
                                     int num_splits) {
  const int first = key_range[2 * sequence], last = key_range[2 * sequence + 1];
  const int tiles = (max(last - first, 0) + kTileKeys - 1) / kTileKeys;
  const auto tile = [&](int i) {
    return static_cast<int>(static_cast<int64_t>(tiles) * i / num_splits);
  };
  return {first + tile(split) * kTileKeys, min(first + tile(split + 1) * kTileKeys, last)};
}

// Lane of a key/value head -> row (R or beyond: none), item, and sequence (-1: skip).
struct LaneMap {
  int group;
  int num_rows;
  int num_heads;
  int first_head;

  __device__ LaneMap(const WindowAttentionParams& p, int kv_head)
      : group(static_cast<int>(p.num_heads / p.num_kv_heads)),
        num_rows(static_cast<int>(p.num_rows)),
        num_heads(static_cast<int>(p.num_heads)),
        first_head(kv_head * group) {}
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

constexpr int kPlainLanes = 8;

template <class T>
__global__ void __launch_bounds__(kPlainLanes* kWarpSize)
    window_attention_plain_kernel(const WindowAttentionParams p, const Parts parts) {
  extern __shared__ float plain_memory[];
  __shared__ int32_t sequences[kPlainLanes];
  __shared__ float weights[kPlainLanes][kWarpSize];
  const int dim = static_cast<int>(p.head_dim);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  float* keys = plain_memory;                    // [32, D + 1]
  float* values = keys + kWarpSize * (dim + 1);  // [32, D]
  float* query = values + kWarpSize * dim + warp * 2 * dim;
  float* out = query + dim;
  const int split = static_cast<int>(blockIdx.y), kv_head = static_cast<int>(blockIdx.z);
  const int64_t first_item = split * p.num_rows * p.num_heads;
  const LaneMap lanes(p, kv_head);
  const int mine = static_cast<int>(blockIdx.x) * kPlainLanes + warp;
  const int slot = lanes.slot(p, mine);
  if (lane == 0) sequences[warp] = lanes.sequence(p, mine);
  const T* from = static_cast<const T*>(p.q_cache) +
                  (slot < 0 ? 0 : (int64_t{slot} * lanes.num_heads + lanes.head(mine)) * dim);
  for (int d = lane; d < dim; d += kWarpSize) query[d] = slot < 0 ? 0.0f : to_float(from[d]);
  __syncthreads();

  const int64_t stride = p.num_kv_heads * dim;
  const float factor = p.scale * kLog2E;
  for (int sequence = next_sequence(sequences, kPlainLanes, -1); sequence != kNoSequence;
       sequence = next_sequence(sequences, kPlainLanes, sequence)) {
    const KeySpan span = split_keys(p.key_range, sequence, split, parts.num_splits);
    float top = -INFINITY, sum = 0.0f;
    for (int d = lane; d < dim; d += kWarpSize) out[d] = 0.0f;
    for (int begin = span.begin; begin < span.end; begin += kWarpSize) {
      const int count = min(span.end - begin, kWarpSize);
      const int64_t start = (sequence * p.capacity + begin) * stride + int64_t{kv_head} * dim;
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < count * dim;
           i += static_cast<int>(blockDim.x)) {
        const int key = i / dim, d = i % dim;
        const int64_t at = start + key * stride + d;
        keys[key * (dim + 1) + d] = to_float(static_cast<const T*>(p.k_cache)[at]);
        values[key * dim + d] = to_float(static_cast<const T*>(p.v_cache)[at]);
      }
      __syncthreads();
      float score = -INFINITY;
      if (lane < count) {
        score = 0.0f;
        for (int d = 0; d < dim; ++d) score += query[d] * keys[lane * (dim + 1) + d];
        score *= factor;
      }
      const float before = top;
      top = fmaxf(top, warp_reduce(score, [](float a, float b) { return fmaxf(a, b); }));
      const float rescale = exp2f(before - top), weight = exp2f(score - top);
      sum = sum * rescale + warp_reduce(weight, Sum{});
      weights[warp][lane] = weight;
      __syncwarp();
      for (int d = lane; d < dim; d += kWarpSize) {
        float total = out[d] * rescale;
        for (int key = 0; key < count; ++key) total += weights[warp][key] * values[key * dim + d];
        out[d] = total;
      }
      __syncwarp();
    }
    if (sequences[warp] != sequence) continue;
    const int64_t item = first_item + lanes.item(mine);
    if (lane == 0) parts.softmax[item] = make_float2(top, sum);
    for (int d = lane; d < dim && sum > 0.0f; d += kWarpSize) parts.out[item * dim + d] = out[d];
  }
}

}  // namespace elastic_cache::cuda::attention
