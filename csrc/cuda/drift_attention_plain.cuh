// What the kernels of drift_attention share: the workspace, what a block knows of its sequence;
// and the plain form of the scan, for any dtype and even head_dim: a thread a key, lanes in turn.
// It is the kernel to read first, and the one float32 uses.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/heuristics.h"
#include "common/reduce.cuh"
#include "common/vector.cuh"
#include "elastic_cache/drift_attention.h"

namespace elastic_cache::cuda::drift {

constexpr int kBlockKeys = kDriftBlockKeys;
constexpr float kLog2E = 1.44269504088896340736f;

// Maximum and sum over two sets of keys; an empty one has maximum -infinity.
__device__ inline float2 join(float2 a, float2 b) {
  const float top = fmaxf(a.x, b.x);
  if (top == -INFINITY) return make_float2(-INFINITY, 0.0f);
  return make_float2(top, a.y * exp2f(a.x - top) + b.y * exp2f(b.x - top));
}

// Tracked rows are numbered through all sequences. Keys are positions.
struct Workspace {
  double* cosines;         // [max_tracked, key blocks] sums over keys
  float2* softmax;         // [max_tracked, H, key blocks] maximum and sum of old scores (base 2)
  float* recent;           // [max_tracked, H, C] new probabilities
  float* old;              // [max_tracked, H, C] old scores (base 2)
  float* mass;             // [H, S, C]
  unsigned int* finished;  // [S] blocks of the comparison
  int max_tracked;
  int num_key_blocks;
};

inline int64_t num_key_blocks(const DriftAttentionParams& p) {
  return std::max<int64_t>((p.capacity + kBlockKeys - 1) / kBlockKeys, 1);
}

inline int64_t max_tracked(const DriftAttentionParams& p) {
  return p.max_tracked > 0 ? std::min(p.max_tracked, p.num_rows) : p.num_rows;
}

// Lays the arrays out from `memory` on, widest elements first; returns the bytes they take.
inline int64_t lay_out(const DriftAttentionParams& p, void* memory, Workspace* w) {
  const int64_t tracked = max_tracked(p), blocks = num_key_blocks(p), heads = p.num_heads;
  auto* at = static_cast<unsigned char*>(memory);
  int64_t bytes = 0;
  const auto take = [&]<class T>(T*& array, int64_t count) {
    array = reinterpret_cast<T*>(at + bytes);
    bytes += count * static_cast<int64_t>(sizeof(T));
  };
  take(w->cosines, tracked * blocks);
  take(w->softmax, tracked * heads * blocks);
  take(w->recent, tracked * heads * p.capacity);
  take(w->old, tracked * heads * p.capacity);
  take(w->mass, heads * p.num_sequences * p.capacity);
  take(w->finished, p.num_sequences);
  w->max_tracked = static_cast<int>(tracked);
  w->num_key_blocks = static_cast<int>(blocks);
  return bytes;
}

// What a block has to know about its sequence.
struct Sequence {
  int index;
  int begin;  // tracked rows: begin .. begin + num_tracked - 1
  int num_tracked;
  int window;  // window rows: window .. window + num_window - 1
  int num_window;
  int end;  // of all its rows
  int first_key;
  int end_key;
  int first_tracked;  // tracked rows of the sequences before
  bool fits;          // whether the workspace has room for the tracked rows

  __device__ Sequence(const DriftAttentionParams& p, const Workspace& w, int s) : index(s) {
    const int32_t* segment = p.segments + s * kSegmentColumns;
    begin = segment[kSegmentBegin];
    num_tracked = segment[kSegmentTracked];
    window = begin + num_tracked + segment[kSegmentCommitted];
    num_window = segment[kSegmentWindow];
    end = window + num_window + segment[kSegmentLookahead];
    first_key = p.key_range[2 * s];
    end_key = max(p.key_range[2 * s + 1], first_key);
    int before = 0;
    for (int i = static_cast<int>(threadIdx.x) % kWarpSize; i < s; i += kWarpSize) {
      before += p.segments[i * kSegmentColumns + kSegmentTracked];
    }
    first_tracked = warp_reduce(before, Sum{});
    fits = first_tracked + num_tracked <= w.max_tracked;
    if (!fits) num_tracked = 0;
  }
  // Lanes of the cache as it is now: window rows, then tracked rows.
  __device__ int num_lanes() const { return num_window + num_tracked; }
  __device__ int row_of(int lane) const {
    return lane < num_window ? window + lane : begin + lane - num_window;
  }
  __device__ bool has_key(int position) const {
    return position >= first_key && position < end_key;
  }
};

// The row that wrote each of a block's keys, or -1. Contains barriers.
__device__ inline void find_overwritten(const DriftAttentionParams& p, const Sequence& q,
                                        int first_position, int (&overwritten_by)[kBlockKeys]) {
  for (int k = static_cast<int>(threadIdx.x); k < kBlockKeys; k += static_cast<int>(blockDim.x)) {
    overwritten_by[k] = -1;
  }
  __syncthreads();
  const int64_t first_slot = q.index * p.capacity + first_position;
  for (int r = q.begin + static_cast<int>(threadIdx.x); r < q.end;
       r += static_cast<int>(blockDim.x)) {
    const int64_t key = p.rows[r] < 0 ? -1 : p.rows[r] - first_slot;
    if (key >= 0 && key < kBlockKeys) atomicMax(&overwritten_by[key], r);
  }
  __syncthreads();
}

// Whether a block of keys has any; the first block of a sequence also starts its count.
__device__ inline bool begin_scan(const DriftAttentionParams& p, const Workspace& w) {
  const int s = static_cast<int>(blockIdx.z), first = static_cast<int>(blockIdx.x) * kBlockKeys;
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) w.finished[s] = 0;
  return max(p.key_range[2 * s], first) < min(p.key_range[2 * s + 1], first + kBlockKeys);
}

template <class T>
__global__ void __launch_bounds__(kBlockKeys)
    drift_plain_scan_kernel(const DriftAttentionParams p, const Workspace w) {
  extern __shared__ float plain_memory[];
  __shared__ int overwritten_by[kBlockKeys];
  __shared__ float reduced[kBlockKeys / kWarpSize];
  if (!begin_scan(p, w)) return;
  const int dim = static_cast<int>(p.head_dim), head = static_cast<int>(blockIdx.y);
  const int kv_head = head / static_cast<int>(p.num_heads / p.num_kv_heads);
  const Sequence q(p, w, static_cast<int>(blockIdx.z));
  const int thread = static_cast<int>(threadIdx.x);
  const int first = static_cast<int>(blockIdx.x) * kBlockKeys, position = first + thread;
  const bool is_valid = q.has_key(position);
  float* keys = plain_memory;                    // [128, D + 1]
  float* query = keys + kBlockKeys * (dim + 1);  // [D]
  // Element i of the block's keys, from a row of k_cache or k_old.
  const auto stage = [&](int i, const void* from, int64_t row) {
    const T* x = static_cast<const T*>(from) + (row * p.num_kv_heads + kv_head) * dim;
    keys[i / dim * (dim + 1) + i % dim] = to_float(x[i % dim]);
  };
  const auto score = [&](const void* from, int64_t row) {
    __syncthreads();
    const T* x = static_cast<const T*>(from) + (row * p.num_heads + head) * dim;
    for (int d = thread; d < dim; d += kBlockKeys) query[d] = to_float(x[d]);
    __syncthreads();
    float total = 0.0f;
    for (int d = 0; d < dim && is_valid; ++d) total += query[d] * keys[thread * (dim + 1) + d];
    return is_valid ? total * (p.scale * kLog2E) : -INFINITY;
  };

  for (int i = thread; i < kBlockKeys * dim; i += kBlockKeys) {
    const int key = first + i / dim;
    if (q.has_key(key)) stage(i, p.k_cache, q.index * p.capacity + key);
  }
  float mass = 0.0f;
  for (int lane = 0; lane < q.num_lanes(); ++lane) {
    const int row = q.row_of(lane), tracked = lane - q.num_window;
    if (p.rows[row] < 0) continue;
    const float lse = p.lse[row * p.num_heads + head] * kLog2E;
    const float weight = exp2f(score(p.q_cache, p.rows[row]) - lse);
    if (!is_valid) continue;
    if (tracked < 0) {
      mass += weight;
    } else {
      w.recent[((q.first_tracked + tracked) * p.num_heads + head) * p.capacity + position] = weight;
    }
  }
  if (is_valid) w.mass[(head * p.num_sequences + q.index) * p.capacity + position] = mass;
  if (q.num_tracked == 0) return;

  find_overwritten(p, q, first, overwritten_by);  // begins with a barrier: the keys are free
  for (int i = thread; i < kBlockKeys * dim; i += kBlockKeys) {
    const int row = overwritten_by[i / dim];
    if (row >= 0 && q.has_key(first + i / dim)) stage(i, p.k_old, row);
  }
  for (int tracked = 0; tracked < q.num_tracked; ++tracked) {
    if (p.rows[q.begin + tracked] < 0) continue;
    const int64_t at = (q.first_tracked + tracked) * p.num_heads + head;
    const float x = score(p.q_old, q.begin + tracked);
    if (is_valid) w.old[at * p.capacity + position] = x;
    const float warp_top = warp_reduce(x, [](float a, float b) { return fmaxf(a, b); });
    if (thread % kWarpSize == 0) reduced[thread / kWarpSize] = warp_top;
    __syncthreads();
    float top = reduced[0];
    for (int warp = 1; warp < kBlockKeys / kWarpSize; ++warp) top = fmaxf(top, reduced[warp]);
    __syncthreads();
    const float total = block_sum(exp2f(x - top), reduced);
    if (thread == 0) w.softmax[at * w.num_key_blocks + blockIdx.x] = make_float2(top, total);
  }
}

}  // namespace elastic_cache::cuda::drift
