// Launches attention, with or without what drift_attention keeps: the part kernel, then
//   combine  a warp a lane adds the parts in order
#pragma once

#include <algorithm>

#include "attention_plain.cuh"
#include "attention_tensor_cores.cuh"

namespace elastic_cache::cuda::attention {

constexpr float kLn2 = 0.69314718055994530942f;

constexpr int kCombineWarps = 4;

// Maximum and sum over two sets of keys; an empty one has maximum -infinity.
__device__ inline float2 join(float2 a, float2 b) {
  const float top = fmaxf(a.x, b.x);
  if (top == -INFINITY) return make_float2(-INFINITY, 0.0f);
  return make_float2(top, a.y * exp2f(a.x - top) + b.y * exp2f(b.x - top));
}

// Log-sum-exp to base 2 of a tracked row as it was and a head, from its scores.
__device__ inline void combine_old(const WindowAttentionParams& p, const DriftParts& drift,
                                   int64_t item) {
  constexpr int kLoads = 16;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const TrackedRow tracked = drift.tracked_row(p, static_cast<int>(item / p.num_heads));
  if (tracked.row < 0) return;
  const int first_key = p.key_range[2 * tracked.sequence];
  const int end_key = p.key_range[2 * tracked.sequence + 1];
  const float* scores = drift.old_scores + item * p.capacity;
  float2 all = make_float2(-INFINITY, 0.0f);
  for (int first = first_key + lane; first < end_key; first += kLoads * kWarpSize) {
    float x[kLoads], top = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int key = first + i * kWarpSize;
      x[i] = key < end_key ? scores[key] : -INFINITY;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) top = fmaxf(top, x[i]);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) sum += exp2f(x[i] - top);
    all = join(all, make_float2(top, sum));
  }
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    all = join(all, make_float2(__shfl_xor_sync(kFullWarp, all.x, offset),
                                __shfl_xor_sync(kFullWarp, all.y, offset)));
  }
  if (lane == 0) drift.old_lse[item] = all.x + log2f(all.y);
}

template <class T, bool kDrift>
__global__ void __launch_bounds__(kCombineWarps* kWarpSize)
    attention_combine_kernel(const WindowAttentionParams p, const Parts parts,
                             const DriftParts drift) {
  wait_for_previous();
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t item =
      int64_t{blockIdx.x} * kCombineWarps + static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t num_items = p.num_rows * p.num_heads;
  if (item >= num_items) {
    const int64_t num_old = kDrift ? drift.max_tracked * p.num_heads : 0;
    if (item - num_items < num_old) combine_old(p, drift, item - num_items);
    return;
  }
  float2 mine = make_float2(-INFINITY, 0.0f);
  if (lane < parts.num_splits) mine = parts.softmax[lane * num_items + item];
  const bool is_skipped = p.rows[item / p.num_heads] < 0;  // then nothing has been written
  if (is_skipped) mine = make_float2(-INFINITY, 0.0f);
  // A comparison that NaN fails, rather than fmaxf, which would hide one.
  const float top = warp_reduce(mine.x, [](float a, float b) { return a > b || a != a ? a : b; });
  const float weight = mine.x == -INFINITY ? 0.0f : exp2f(mine.x - top);
  const float sum = warp_reduce(weight * mine.y, Sum{});
  const unsigned int present = __ballot_sync(kFullWarp, mine.x != -INFINITY);
  if (lane == 0) p.lse[item] = is_skipped ? 0.0f : (top + log2f(sum)) * kLn2;

  const float inverse = present == 0 ? 0.0f : 1.0f / sum;
  const int num_pairs = static_cast<int>(p.head_dim) / 2;
  const auto* from = reinterpret_cast<const float2*>(parts.out) + item * num_pairs;
  T* to = static_cast<T*>(p.out) + item * p.head_dim;
  for (int first = 0; first < num_pairs; first += kWarpSize) {
    const int pair = first + lane;
    float2 total = make_float2(0.0f, 0.0f);
#pragma unroll 8
    for (int s = 0; s < parts.num_splits; ++s) {
      const float scale = __shfl_sync(kFullWarp, weight, s);
      if (!(present >> s & 1) || pair >= num_pairs) continue;
      const float2 x = from[s * num_items * num_pairs + pair];
      total.x += scale * x.x;
      total.y += scale * x.y;
    }
    if (pair >= num_pairs) continue;
    to[2 * pair] = from_float<T>(total.x * inverse);
    to[2 * pair + 1] = from_float<T>(total.y * inverse);
  }
}

// ---- Launchers ----

constexpr const char* kOp[] = {"window_attention", "drift_attention"};

inline int64_t num_lanes(const WindowAttentionParams& p, int64_t rows) {
  return rows * (p.num_heads / p.num_kv_heads);
}

template <int D, bool kDrift>
void launch_tensor_cores(const WindowAttentionParams& p, const Parts& parts,
                         const DriftParts& drift, Stream stream) {
  const int64_t lanes = num_lanes(p, p.num_rows);
  const auto launch = [&]<int M>() {
    int64_t blocks = std::max<int64_t>((lanes + M - 1) / M, 1);
    if (kDrift) {
      const int64_t old = num_lanes(p, drift.max_tracked);
      blocks = std::max(blocks, (old + kOldLanes - 1) / kOldLanes);
    }
    const dim3 grid(static_cast<unsigned int>(blocks), static_cast<unsigned int>(parts.num_splits),
                    static_cast<unsigned int>(p.num_kv_heads));
    launch_overlapping(kOp[kDrift], attention_part_kernel<D, M, kDrift>, grid, kNumThreads, stream,
                       SharedBytes{sizeof(PartShared<D, M, kDrift>)}, p, parts, drift);
  };
  if (lanes <= 16) return launch.template operator()<16>();
  if (lanes <= 32) return launch.template operator()<32>();
  launch.template operator()<64>();
}

inline bool has_tensor_core_form(const WindowAttentionParams& p, const DriftParts& drift) {
  const auto fits = [&](const void* x) { return are_vectors<bf16>({x}, {p.head_dim}); };
  return p.dtype == DType::kBFloat16 &&
         (p.head_dim == 32 || p.head_dim == 64 || p.head_dim == 128) && fits(p.q_cache) &&
         fits(p.k_cache) && fits(p.v_cache) && fits(drift.q_old) && fits(drift.k_old);
}

template <class T, bool kDrift>
void launch_plain(const WindowAttentionParams& p, const Parts& parts, const DriftParts& drift,
                  Stream stream) {
  const int64_t floats = kWarpSize * (2 * p.head_dim + 1) + kPlainLanes * 2 * p.head_dim;
  const int64_t lanes = std::max<int64_t>(num_lanes(p, p.num_rows), 1);
  const unsigned int present = blocks_for(lanes, kPlainLanes);
  const unsigned int old = kDrift ? blocks_for(num_lanes(p, drift.max_tracked), kPlainLanes) : 0;
  const dim3 grid(present + old, static_cast<unsigned int>(parts.num_splits),
                  static_cast<unsigned int>(p.num_kv_heads));
  launch_overlapping(kOp[kDrift], attention_plain_part_kernel<T, kDrift>, grid,
                     kPlainLanes * kWarpSize, stream,
                     SharedBytes{static_cast<size_t>(floats) * sizeof(float)}, p, parts, drift,
                     static_cast<int>(present));
}

template <class T, bool kDrift>
void launch_kernels(const WindowAttentionParams& p, const Parts& parts, const DriftParts& drift,
                    Stream stream) {
  if (!has_tensor_core_form(p, drift)) {
    launch_plain<T, kDrift>(p, parts, drift, stream);
  } else if (p.head_dim == 32) {
    launch_tensor_cores<32, kDrift>(p, parts, drift, stream);
  } else if (p.head_dim == 64) {
    launch_tensor_cores<64, kDrift>(p, parts, drift, stream);
  } else {
    launch_tensor_cores<128, kDrift>(p, parts, drift, stream);
  }
  const int64_t items = (p.num_rows + (kDrift ? drift.max_tracked : 0)) * p.num_heads;
  launch_overlapping(kOp[kDrift], attention_combine_kernel<T, kDrift>,
                     dim3(blocks_for(std::max<int64_t>(items, 1), kCombineWarps)),
                     kCombineWarps * kWarpSize, stream, p, parts, drift);
}

// Attention with p.workspace for its parts.
template <bool kDrift>
void launch(const WindowAttentionParams& p, const DriftParts& drift, Stream stream) {
  Parts parts{};
  parts.num_splits = static_cast<int>(attention_splits(p.num_kv_heads, p.capacity));
  parts.softmax = static_cast<float2*>(p.workspace);
  parts.out = reinterpret_cast<float*>(parts.softmax + parts.num_splits * p.num_rows * p.num_heads);
  with_dtype(p.dtype,
             [&](auto zero) { launch_kernels<decltype(zero), kDrift>(p, parts, drift, stream); });
}

}  // namespace elastic_cache::cuda::attention
