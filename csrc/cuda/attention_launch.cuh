// Launches attention: the part kernel, then
//   combine  a warp a lane adds the parts in order
#pragma once

#include <algorithm>

#include "attention_mma.cuh"
#include "attention_plain.cuh"
#include "attention_wgmma.cuh"
#include "common/tensor_map.h"

namespace elastic_cache::cuda::attention {

constexpr int kCombineWarps = 4;

// Four parts of kWidth elements of an item, from split `first` on. What has not been written is
// read as well, and left out later: so nothing has to be known before.
template <int kWidth>
struct FourParts {
  Pack<float, kWidth> x[4];

  __device__ FourParts(const float* from, int64_t stride, int first, int num_splits) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first + i < num_splits) x[i] = load_pack<float, kWidth>(from + (first + i) * stride);
    }
  }
  // `present`: a bit a split; `weight`: of split i in thread i of the warp.
  __device__ void add_to(float (&total)[kWidth], int first, unsigned int present,
                         float weight) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float scale = __shfl_sync(kFullWarp, weight, (first + i) % kWarpSize);
      if (first + i >= kWarpSize || !(present >> (first + i) & 1)) continue;
#pragma unroll
      for (int n = 0; n < kWidth; ++n) total[n] += scale * x[i].data[n];
    }
  }
};

// A thread takes kWidth elements of an item at a time.
template <class T, int kWidth>
__global__ void __launch_bounds__(kCombineWarps* kWarpSize)
    attention_combine_kernel(const WindowAttentionParams p, const Parts parts) {
  let_next_start();  // a product: it reads weights ahead
  wait_for_previous();
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t item =
      int64_t{blockIdx.x} * kCombineWarps + static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t num_items = p.num_rows * p.num_heads;
  if (item >= num_items) return;
  const int dim = static_cast<int>(p.head_dim), num_splits = parts.num_splits;
  const int64_t stride = num_items * dim;
  const auto part = [&](int first, int element) {
    return FourParts<kWidth>(parts.out + item * dim + min(element, dim - kWidth), stride, first,
                             num_splits);
  };
  float2 mine = make_float2(-INFINITY, 0.0f);
  if (lane < num_splits) mine = parts.softmax[lane * num_items + item];
  const int row = static_cast<int>(item) / static_cast<int>(p.num_heads);
  const bool is_skipped = p.rows[row] < 0;  // then nothing has been written
  FourParts<kWidth> ahead = part(0, lane * kWidth);
  if (is_skipped) mine = make_float2(-INFINITY, 0.0f);
  // A comparison that NaN fails, rather than fmaxf, which would hide one.
  const float top = warp_reduce(mine.x, [](float a, float b) { return a > b || a != a ? a : b; });
  const float weight = mine.x == -INFINITY ? 0.0f : exp2_flush(mine.x - top);
  const float sum = warp_reduce(weight * mine.y, Sum{});
  const unsigned int present = __ballot_sync(kFullWarp, mine.x != -INFINITY);
  if (lane == 0) p.lse[item] = is_skipped ? 0.0f : log_sum(top, sum);

  const float inverse = present == 0 ? 0.0f : 1.0f / sum;
  for (int first = 0; first < dim; first += kWarpSize * kWidth) {
    const int element = first + lane * kWidth;
    float total[kWidth] = {};
    if (first > 0) ahead = part(0, element);
    ahead.add_to(total, 0, present, weight);
    for (int s = 4; s < num_splits; s += 4) part(s, element).add_to(total, s, present, weight);
    if (element >= dim) continue;
    T* to = static_cast<T*>(p.out) + item * dim + element;
    Pack<T, kWidth> out;
#pragma unroll
    for (int n = 0; n < kWidth; ++n) out.data[n] = from_float<T>(total[n] * inverse);
    if constexpr (kWidth == 4) {
      store_pack(to, out);
    } else {
#pragma unroll
      for (int n = 0; n < kWidth; ++n) to[n] = out.data[n];
    }
  }
}

// ---- Launchers ----

constexpr const char* kOp = "window_attention";

inline int64_t num_lanes(const WindowAttentionParams& p) {
  return p.num_rows * (p.num_heads / p.num_kv_heads);
}

// As many blocks a head as there can be pieces, those of all heads first that are sure to be there:
// the others end at once, and may do so while these run.
template <int D, class B>
void launch_blocks(const WindowAttentionParams& p, const Parts& parts, Stream stream) {
  const int64_t num_pieces = (num_lanes(p) + p.num_sequences * (B::kLanes - 1)) / B::kLanes;
  const dim3 grid(static_cast<unsigned int>(p.num_kv_heads),
                  static_cast<unsigned int>(parts.num_splits),
                  static_cast<unsigned int>(num_pieces));
  const auto map = [&](const void* cache) {
    return cache_map<D>(kOp, cache, p.num_sequences * p.capacity, p.num_kv_heads);
  };
  launch_overlapping(kOp, attention_wgmma_kernel<D, B>, grid, B::kThreads, stream,
                     SharedBytes{kWgmmaBytes<D, B>}, map(p.k_cache), map(p.v_cache), p, parts);
}

// Returns whether there is nothing to combine.
template <int D>
bool launch_tensor_cores(const WindowAttentionParams& p, const Parts& parts, Stream stream) {
  const bool has_pieces = p.num_sequences == 1 || (p.num_sequences > 1 && p.segments != nullptr);
  if constexpr (D % wgmma::kBlockColumns == 0) {
    if (has_pieces && has_cache_map(p.num_sequences * p.capacity)) {
      if (p.num_sequences == 1) {
        launch_blocks<D, Blocks<true>>(p, parts, stream);
      } else {
        launch_blocks<D, Blocks<false>>(p, parts, stream);
      }
      return parts.num_splits == 1;
    }
  }
  const int64_t lanes = num_lanes(p);
  const auto launch = [&]<int M>() {
    const dim3 grid(blocks_for(lanes, M), static_cast<unsigned int>(parts.num_splits),
                    static_cast<unsigned int>(p.num_kv_heads));
    launch_overlapping(kOp, attention_mma_kernel<D, M>, grid, kNumThreads, stream,
                       SharedBytes{sizeof(PartShared<D, M>)}, p, parts);
  };
  if (lanes <= 16) {
    launch.template operator()<16>();
  } else if (lanes <= 32) {
    launch.template operator()<32>();
  } else {
    launch.template operator()<64>();
  }
  return false;
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
  bool is_whole = false;
  if (!has_tensor_core_form(p)) {
    launch_plain<T>(p, parts, stream);
  } else if (p.head_dim == 32) {
    is_whole = launch_tensor_cores<32>(p, parts, stream);
  } else if (p.head_dim == 64) {
    is_whole = launch_tensor_cores<64>(p, parts, stream);
  } else {
    is_whole = launch_tensor_cores<128>(p, parts, stream);
  }
  if (is_whole) return;
  const auto combine = [&]<int kWidth>() {
    launch_overlapping(kOp, attention_combine_kernel<T, kWidth>,
                       dim3(blocks_for(p.num_rows * p.num_heads, kCombineWarps)),
                       kCombineWarps * kWarpSize, stream, p, parts);
  };
  const bool has_vectors = p.head_dim % 4 == 0 && are_vectors<T>({p.out}, {});
  return has_vectors ? combine.template operator()<4>() : combine.template operator()<2>();
}

// Attention with p.workspace for its parts.
inline void launch(const WindowAttentionParams& p, Stream stream) {
  Parts parts{};
  parts.num_splits =
      static_cast<int>(attention_splits(p.num_kv_heads, p.capacity, p.num_sequences));
  parts.out = static_cast<float*>(p.workspace);
  parts.softmax = reinterpret_cast<float2*>(parts.out + parts.num_splits * p.num_rows *
                                                            p.num_heads * p.head_dim);
  with_dtype(p.dtype, [&](auto zero) { launch_kernels<decltype(zero)>(p, parts, stream); });
}

}  // namespace elastic_cache::cuda::attention
