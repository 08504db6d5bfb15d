// Launches attention: the part kernel, then
//   combine  a warp a lane adds the parts in order
#pragma once

#include <algorithm>

#include "attention_mma.cuh"
#include "attention_plain.cuh"
#include "attention_wgmma.cuh"

namespace elastic_cache::cuda::attention {

constexpr float kLn2 = 0.69314718055994530942f;

constexpr int kCombineWarps = 4;

template <class T>
__global__ void __launch_bounds__(kCombineWarps* kWarpSize)
    attention_combine_kernel(const WindowAttentionParams p, const Parts parts) {
  let_next_start();  // a product: it reads weights ahead
  wait_for_previous();
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t item =
      int64_t{blockIdx.x} * kCombineWarps + static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t num_items = p.num_rows * p.num_heads;
  if (item >= num_items) return;
  float2 mine = make_float2(-INFINITY, 0.0f);
  if (lane < parts.num_splits) mine = parts.softmax[lane * num_items + item];
  const bool is_skipped = p.rows[item / p.num_heads] < 0;  // then nothing has been written
  if (is_skipped) mine = make_float2(-INFINITY, 0.0f);
  // A comparison that NaN fails, rather than fmaxf, which would hide one.
  const float top = warp_reduce(mine.x, [](float a, float b) { return a > b || a != a ? a : b; });
  const float weight = mine.x == -INFINITY ? 0.0f : exp2_flush(mine.x - top);
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

constexpr const char* kOp = "window_attention";

inline int64_t num_lanes(const WindowAttentionParams& p) {
  return p.num_rows * (p.num_heads / p.num_kv_heads);
}

template <int D>
void launch_wgmma(const WindowAttentionParams& p, const Parts& parts, Stream stream) {
  const dim3 grid(blocks_for(num_lanes(p), kBlockLanes),
                  static_cast<unsigned int>(parts.num_splits),
                  static_cast<unsigned int>(p.num_kv_heads));
  launch_overlapping(kOp, attention_wgmma_kernel<D>, grid, kBlockThreads, stream,
                     SharedBytes{kWgmmaBytes<D>}, p, parts);
}

template <int D>
void launch_tensor_cores(const WindowAttentionParams& p, const Parts& parts, Stream stream) {
  if constexpr (D % wgmma::kBlockColumns == 0) {
    if (DeviceLimits::current().has_wgmma) return launch_wgmma<D>(p, parts, stream);
  }
  const int64_t lanes = num_lanes(p);
  const auto launch = [&]<int M>() {
    const dim3 grid(blocks_for(lanes, M), static_cast<unsigned int>(parts.num_splits),
                    static_cast<unsigned int>(p.num_kv_heads));
    launch_overlapping(kOp, attention_mma_kernel<D, M>, grid, kNumThreads, stream,
                       SharedBytes{sizeof(PartShared<D, M>)}, p, parts);
  };
  if (lanes <= 16) return launch.template operator()<16>();
  if (lanes <= 32) return launch.template operator()<32>();
  launch.template operator()<64>();
}

inline bool has_tensor_core_form(const WindowAttentionParams& p) {
  const auto fits = [&](const void* x) { return are_vectors<bf16>({x}, {p.head_dim}); };
  return p.dtype == DType::kBFloat16 &&
         (p.head_dim == 32 || p.head_dim == 64 || p.head_dim == 128) && fits(p.q_cache) &&
         fits(p.k_cache) && fits(p.v_cache);
}

template <class T>
void launch_plain(const WindowAttentionParams& p, const Parts& parts, Stream stream) {
  const int64_t floats = kWarpSize * (2 * p.head_dim + 1) + kPlainLanes * 2 * p.head_dim;
  const dim3 grid(blocks_for(num_lanes(p), kPlainLanes),
                  static_cast<unsigned int>(parts.num_splits),
                  static_cast<unsigned int>(p.num_kv_heads));
  launch_overlapping(kOp, attention_plain_part_kernel<T>, grid, kPlainLanes * kWarpSize, stream,
                     SharedBytes{static_cast<size_t>(floats) * sizeof(float)}, p, parts);
}

template <class T>
void launch_kernels(const WindowAttentionParams& p, const Parts& parts, Stream stream) {
  if (!has_tensor_core_form(p)) {
    launch_plain<T>(p, parts, stream);
  } else if (p.head_dim == 32) {
    launch_tensor_cores<32>(p, parts, stream);
  } else if (p.head_dim == 64) {
    launch_tensor_cores<64>(p, parts, stream);
  } else {
    launch_tensor_cores<128>(p, parts, stream);
  }
  launch_overlapping(kOp, attention_combine_kernel<T>,
                     dim3(blocks_for(p.num_rows * p.num_heads, kCombineWarps)),
                     kCombineWarps * kWarpSize, stream, p, parts);
}

// Attention with p.workspace for its parts.
inline void launch(const WindowAttentionParams& p, Stream stream) {
  Parts parts{};
  parts.num_splits = static_cast<int>(attention_splits(p.num_kv_heads, p.capacity));
  parts.softmax = static_cast<float2*>(p.workspace);
  parts.out = reinterpret_cast<float*>(parts.softmax + parts.num_splits * p.num_rows * p.num_heads);
  with_dtype(p.dtype, [&](auto zero) { launch_kernels<decltype(zero)>(p, parts, stream); });
}

}  // namespace elastic_cache::cuda::attention
