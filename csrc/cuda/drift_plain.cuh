// The plain form of drift_statistics, for any dtype and head_dim: the kernels to read first, and
// those that float32 uses. A product is taken by a warp.
#pragma once

#include "drift_lanes.cuh"

namespace elastic_cache::cuda::drift {

constexpr int kPlainWarps = 8;

// query . key to base 2, the same value in every thread of the warp.
template <class T>
__device__ inline float score(const DriftStatisticsParams& p, const T* query, const T* key) {
  float product = 0.0f;
  for (int d = static_cast<int>(threadIdx.x) % kWarpSize; d < p.head_dim; d += kWarpSize) {
    product += to_float(query[d]) * to_float(key[d]);
  }
  return warp_reduce(product, Sum{}) * (p.scale * kLog2E);
}

// The keys of a sequence, as they are and as they were.
template <class T>
struct Keys {
  const DriftStatisticsParams& p;
  const Sequence& q;

  __device__ const T* now(int position, int head) const {
    return at(p.k_cache, q.first_cached + position, head);
  }
  __device__ const T* before(int position, int row, int head) const {
    return row < 0 ? now(position, head) : at(p.k_old, q.first_old + row, head);
  }
  // The row that overwrote a position, -1 for none; found by the warp.
  __device__ int overwriting(int position) const {
    int found = -1;
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    for (int r = q.begin + lane; r < q.end && p.k_old != nullptr; r += kWarpSize) {
      if (q.position(p, r) == position) found = r;
    }
    return __reduce_max_sync(kFullWarp, found);
  }

 private:
  __device__ const T* at(const void* keys, int64_t row, int head) const {
    const int64_t kv_head = head / (p.num_heads / p.num_kv_heads);
    return static_cast<const T*>(keys) + (row * p.num_kv_heads + kv_head) * p.head_dim;
  }
};

template <class T>
__device__ inline const T* query_of(const DriftStatisticsParams& p, const Sequence& q, int lane,
                                    int row, int head) {
  const auto* queries = static_cast<const T*>(lane < kOldLanes ? p.q_cache : p.q_old);
  return queries + (q.query(p, lane, row) * p.num_heads + head) * p.head_dim;
}

// A warp a lane: blockIdx = (head * passes * 48 + ..., sequence, layer).
template <class T>
__global__ void __launch_bounds__(kPlainWarps* kWarpSize)
    plain_log_sum_kernel(const DriftStatisticsParams p, const Layout layout) {
  wait_for_previous();
  const int s = static_cast<int>(blockIdx.y), layer = static_cast<int>(blockIdx.z);
  const Sequence q(p, layer, s);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int item = static_cast<int>(blockIdx.x) * kPlainWarps + warp, lane = item % kLanes;
  const int head = item / kLanes % static_cast<int>(p.num_heads);
  const int pass = item / kLanes / static_cast<int>(p.num_heads);
  if (pass >= q.num_passes()) return;
  const int row = q.row(p, pass, lane);
  const bool is_given = lane < kOldLanes && p.lse != nullptr;
  const Keys<T> keys{p, q};
  Softmax all;
  if (row >= 0 && !is_given) {
    const T* query = query_of<T>(p, q, lane, row, head);
    for (int key = q.first_key; key < q.end_key; ++key) {
      const int old_row = lane < kOldLanes ? -1 : keys.overwriting(key);
      all.add({score<T>(p, query, keys.before(key, old_row, head)), 1.0f});
    }
  }
  if (threadIdx.x % kWarpSize == 0) {
    layout.lse[lse_index(p, layout, layer, s, pass, head) + lane] =
        is_given  ? given_log_sum(p, q, row, head)
        : row < 0 ? INFINITY
                  : all.log_sum();
  }
}

// Mass of a key, and the sum of its cosines; the same in every thread of the warp.
template <class T>
__device__ inline double measure_key(const DriftStatisticsParams& p, const Layout& layout,
                                     const Sequence& q, int layer, int key, float* mass) {
  const Keys<T> keys{p, q};
  const int old_row = keys.overwriting(key);
  double cosines = 0.0;
  for (int pass = 0; pass < q.num_passes(); ++pass) {
    const auto weight = [&](int lane, int row, int head, const T* at) {
      const float lse = layout.lse[lse_index(p, layout, layer, q.index, pass, head) + lane];
      return exp2_flush(score<T>(p, query_of<T>(p, q, lane, row, head), at) - lse);
    };
    for (int i = 0; i < kPassRows; ++i) {
      const int window_row = q.row(p, pass, kWindowLanes + i);
      const int tracked_row = q.row(p, pass, kTrackedLanes + i);
      Products products;
      for (int head = 0; head < p.num_heads; ++head) {
        const T* now = keys.now(key, head);
        if (window_row >= 0) *mass += weight(kWindowLanes + i, window_row, head, now);
        if (tracked_row < 0) continue;
        const T* before = keys.before(key, old_row, head);
        products.add(weight(kOldLanes + i, tracked_row, head, before),
                     weight(kTrackedLanes + i, tracked_row, head, now));
      }
      if (tracked_row >= 0) cosines += products.cosine();
    }
  }
  return cosines;
}

// A warp a key: blockIdx = (key / 8, sequence, layer).
template <class T>
__global__ void __launch_bounds__(kPlainWarps* kWarpSize)
    plain_statistics_kernel(const DriftStatisticsParams p, const Layout layout) {
  __shared__ double shared[kPlainWarps];
  wait_for_previous();
  const int s = static_cast<int>(blockIdx.y), layer = static_cast<int>(blockIdx.z);
  const Sequence q(p, layer, s);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int key = static_cast<int>(blockIdx.x) * kPlainWarps + warp;
  float mass = 0.0f;
  double cosines = 0.0;
  if (key >= q.first_key && key < q.end_key) {
    cosines = measure_key<T>(p, layout, q, layer, key, &mass);
  }
  if (lane == 0 && key < p.capacity) p.mass[q.first_cached + key] = mass;
  const double total = block_sum(lane == 0 ? cosines : 0.0, shared);
  if (threadIdx.x == 0) {
    layout.cosines[(int64_t{layer} * p.num_sequences + s) * layout.num_blocks + blockIdx.x] = total;
  }
}

}  // namespace elastic_cache::cuda::drift
