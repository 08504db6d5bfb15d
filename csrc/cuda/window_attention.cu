// Attention of a few rows over all keys of their sequence, with log-sum-exp (window_attention.h).
//
// A lane is a (row, query head) pair; the lanes of a key/value head share its keys. Two kernels:
//   part     a block takes up to 64 lanes of one key/value head and one of `num_splits` parts of
//            the keys -> unnormalised output [D], maximum and sum of every lane
//   combine  a warp a lane adds the parts in order
// Tensor-core form, a tile of 64 keys and four warps: a warp computes the scores of 16 keys for
// all lanes, the warps agree on the maximum, weights go through shared memory as bf16, and then a
// warp computes D / 4 columns of the output from all 64 keys. K and V are read once from shared
// memory however many lanes there are.
// The subtle thing: nothing a lane's result goes through depends on which lanes, or how many, are
// beside it. Rows of several sequences in a block: it runs over the keys of each, computing all
// lanes, and writes those the keys belong to.
#include "elastic_cache/window_attention.h"

#include <cmath>

#include "common/heuristics.h"
#include "common/launch.h"
#include "common/mma.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"
#include "window_attention_plain.cuh"

namespace elastic_cache {
namespace cuda::attention {
namespace {

using bf16 = __nv_bfloat16;

constexpr int kNumWarps = 4;
constexpr int kNumThreads = kNumWarps * kWarpSize;
constexpr int kKeysPerWarp = kTileKeys / kNumWarps;
static_assert(kKeysPerWarp == 16, "a warp's scores are two B fragments wide");
constexpr float kLn2 = 0.69314718055994530942f;

// ---- Tensor cores: D is head_dim, M lanes a block ----

template <int D, int M>
struct alignas(16) PartShared {
  bf16 keys[2][kTileKeys][D + kRowPad];
  bf16 values[2][kTileKeys][D + kRowPad];
  bf16 queries[M][D + kRowPad];
  bf16 weights[M][kTileKeys + kRowPad];
  float warp_max[kNumWarps][M];
  float warp_sum[kNumWarps][M];
  float max[M];
  int32_t sequences[M];
};

// A thread's share: of the scores those of its warp's 16 keys, of the output its warp's columns;
// [half] are the rows lane / 4 and lane / 4 + 8 of a C fragment. `sum` is this thread's part.
template <int D, int M>
struct PartState {
  float out[M / 16][D / 32][4];
  float max[M / 16][2];
  float sum[M / 16][2];

  __device__ void clear() {
#pragma unroll
    for (int m = 0; m < M / 16; ++m) {
      max[m][0] = max[m][1] = -INFINITY;
      sum[m][0] = sum[m][1] = 0.0f;
#pragma unroll
      for (int n = 0; n < D / 32; ++n) {
        out[m][n][0] = out[m][n][1] = out[m][n][2] = out[m][n][3] = 0.0f;
      }
    }
  }
};

template <int M>
using Scores = float[M / 16][2][4];

// Starts copying `count` rows of D elements, `stride` apart; rows beyond them become zero: a weight
// of zero times what lies behind the key range must not be NaN.
template <int D>
__device__ inline void copy_tile(bf16 (&tile)[kTileKeys][D + kRowPad], const bf16* from,
                                 int64_t stride, int count) {
  constexpr int kVectors = D / 8;
#pragma unroll
  for (int i = 0; i < kTileKeys * kVectors / kNumThreads; ++i) {
    const int at = i * kNumThreads + static_cast<int>(threadIdx.x);
    const int key = at / kVectors, column = at % kVectors * 8;
    const bool is_valid = key < count;
    copy_async(&tile[key][column], from + (is_valid ? key : 0) * stride + column, is_valid);
  }
}

template <int D, int M>
__device__ inline void copy_queries(const WindowAttentionParams& p, const LaneMap& lanes,
                                    int first_lane, PartShared<D, M>& sh) {
  constexpr int kVectors = D / 8;
  const auto* queries = static_cast<const bf16*>(p.q_cache);
#pragma unroll
  for (int i = 0; i < M * kVectors / kNumThreads + (M * kVectors % kNumThreads != 0); ++i) {
    const int at = i * kNumThreads + static_cast<int>(threadIdx.x);
    const int m = at / kVectors, column = at % kVectors * 8;
    if (m >= M) break;
    const int slot = lanes.slot(p, first_lane + m);
    const int64_t from =
        slot < 0 ? 0 : (int64_t{slot} * lanes.num_heads + lanes.head(first_lane + m)) * D;
    copy_async(&sh.queries[m][column], queries + from + column, slot >= 0);
  }
  for (int m = static_cast<int>(threadIdx.x); m < M; m += kNumThreads) {
    sh.sequences[m] = lanes.sequence(p, first_lane + m);
  }
}

// Scores of this warp's 16 keys.
template <int D, int M>
__device__ inline void score_tile(const PartShared<D, M>& sh, int buffer, Scores<M>& score) {
  const int first_key = static_cast<int>(threadIdx.x) / kWarpSize * kKeysPerWarp;
#pragma unroll
  for (int m = 0; m < M / 16; ++m) {
#pragma unroll
    for (int i = 0; i < 8; ++i) score[m][i / 4][i % 4] = 0.0f;
  }
#pragma unroll
  for (int d = 0; d < D; d += 16) {
    uint32_t k[4], q[4];
    load_matrices(k, &sh.keys[buffer][first_key + b_row()][d + b_column()]);
#pragma unroll
    for (int m = 0; m < M / 16; ++m) {
      load_matrices(q, &sh.queries[m * 16 + a_row()][d + a_column()]);
      multiply_add(score[m][0], q, k[0], k[1]);
      multiply_add(score[m][1], q, k[2], k[3]);
    }
  }
}

// Scores to base 2, those beyond `count` keys to -infinity; the warp's maximum of every lane.
template <int D, int M>
__device__ inline void find_maximum(PartShared<D, M>& sh, float factor, int count,
                                    Scores<M>& score) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
#pragma unroll
  for (int m = 0; m < M / 16; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = -INFINITY;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = warp * kKeysPerWarp + i / 2 * 8 + lane % 4 * 2 + i % 2;
        float& x = score[m][i / 2][half * 2 + i % 2];
        x = key < count ? __fmul_rn(x, factor) : -INFINITY;
        top = fmaxf(top, x);
      }
      top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 2));
      if (lane % 4 == 0) sh.warp_max[warp][m * 16 + half * 8 + lane / 4] = top;
    }
  }
}

// Weights of this warp's keys into shared memory; what was added before is rescaled. Products and
// sums say how they round: the forms for 16, 32 and 64 lanes must not be contracted differently.
template <int D, int M>
__device__ inline void weigh(PartShared<D, M>& sh, const Scores<M>& score, PartState<D, M>& state) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
#pragma unroll
  for (int m = 0; m < M / 16; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m * 16 + half * 8 + lane / 4;
      float top = state.max[m][half];
#pragma unroll
      for (int w = 0; w < kNumWarps; ++w) top = fmaxf(top, sh.warp_max[w][row]);
      const float rescale = exp2f(state.max[m][half] - top);  // 0 for the first tile
      state.max[m][half] = top;
#pragma unroll
      for (int n = 0; n < D / 32; ++n) {
        state.out[m][n][half * 2] *= rescale;
        state.out[m][n][half * 2 + 1] *= rescale;
      }
      float total = 0.0f;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float a = exp2f(score[m][n][half * 2] - top);
        const float b = exp2f(score[m][n][half * 2 + 1] - top);
        total += a + b;
        *reinterpret_cast<__nv_bfloat162*>(
            &sh.weights[row][warp * kKeysPerWarp + n * 8 + lane % 4 * 2]) =
            __floats2bfloat162_rn(a, b);
      }
      state.sum[m][half] = __fmaf_rn(state.sum[m][half], rescale, total);
    }
  }
}

// This warp's D / 4 columns of weights x values.
template <int D, int M>
__device__ inline void add_values(const PartShared<D, M>& sh, int buffer, PartState<D, M>& state) {
  const int first_column = static_cast<int>(threadIdx.x) / kWarpSize * (D / 4);
#pragma unroll
  for (int k = 0; k < kTileKeys; k += 16) {
    uint32_t v[D / 32][2], w[4];
    const bf16(&from)[D + kRowPad] = sh.values[buffer][k + a_row()];
    if constexpr (D == 32) {
      load_matrices_transposed(v[0], &from[first_column]);
    } else {
#pragma unroll
      for (int n = 0; n < D / 32; n += 2) {
        uint32_t two[4];
        load_matrices_transposed(two, &from[first_column + n * 8 + a_column()]);
        v[n][0] = two[0], v[n][1] = two[1], v[n + 1][0] = two[2], v[n + 1][1] = two[3];
      }
    }
#pragma unroll
    for (int m = 0; m < M / 16; ++m) {
      load_matrices(w, &sh.weights[m * 16 + a_row()][k + a_column()]);
#pragma unroll
      for (int n = 0; n < D / 32; ++n) multiply_add(state.out[m][n], w, v[n][0], v[n][1]);
    }
  }
}

// Lanes of `sequence` -> parts. Contains barriers; begins after one.
template <int D, int M>
__device__ inline void write_part(const LaneMap& lanes, int first_lane, int sequence,
                                  int64_t first_item, const Parts& parts, PartShared<D, M>& sh,
                                  const PartState<D, M>& state) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
#pragma unroll
  for (int m = 0; m < M / 16; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m * 16 + half * 8 + lane / 4;
      float sum = state.sum[m][half];
      sum += __shfl_xor_sync(kFullWarp, sum, 1);
      sum += __shfl_xor_sync(kFullWarp, sum, 2);
      if (lane % 4 == 0) sh.warp_sum[warp][row] = sum;
      if (lane % 4 == 0 && warp == 0) sh.max[row] = state.max[m][half];
      if (sh.sequences[row] != sequence) continue;
      float* to = parts.out + (first_item + lanes.item(first_lane + row)) * D + warp * (D / 4) +
                  lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < D / 32; ++n) {
        *reinterpret_cast<float2*>(to + n * 8) =
            make_float2(state.out[m][n][half * 2], state.out[m][n][half * 2 + 1]);
      }
    }
  }
  __syncthreads();
  for (int m = static_cast<int>(threadIdx.x); m < M; m += kNumThreads) {
    if (sh.sequences[m] != sequence) continue;
    float sum = 0.0f;
    for (int w = 0; w < kNumWarps; ++w) sum += sh.warp_sum[w][m];
    parts.softmax[first_item + lanes.item(first_lane + m)] = make_float2(sh.max[m], sum);
  }
  __syncthreads();
}

template <int D, int M>
__global__ void __launch_bounds__(kNumThreads, 2)
    window_attention_part_kernel(const WindowAttentionParams p, const Parts parts) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto& sh = *reinterpret_cast<PartShared<D, M>*>(memory);
  const int first_lane = static_cast<int>(blockIdx.x) * M;
  const int split = static_cast<int>(blockIdx.y), kv_head = static_cast<int>(blockIdx.z);
  const int64_t first_item = split * p.num_rows * p.num_heads;
  const LaneMap lanes(p, kv_head);
  copy_queries(p, lanes, first_lane, sh);  // complete with the first tile of keys
  __syncthreads();

  const int64_t stride = p.num_kv_heads * D;
  const float factor = p.scale * kLog2E;
  for (int sequence = next_sequence(sh.sequences, M, -1); sequence != kNoSequence;
       sequence = next_sequence(sh.sequences, M, sequence)) {
    const KeySpan span = split_keys(p.key_range, sequence, split, parts.num_splits);
    const int num_tiles = max(span.end - span.begin + kTileKeys - 1, 0) / kTileKeys;
    if (num_tiles == 0) {
      for (int m = static_cast<int>(threadIdx.x); m < M; m += kNumThreads) {
        if (sh.sequences[m] != sequence) continue;
        parts.softmax[first_item + lanes.item(first_lane + m)] = make_float2(-INFINITY, 0.0f);
      }
      continue;
    }
    const int64_t start = (sequence * p.capacity + span.begin) * stride + kv_head * D;
    const auto* keys = static_cast<const bf16*>(p.k_cache) + start;
    const auto* values = static_cast<const bf16*>(p.v_cache) + start;
    // Two groups a tile: its keys, its values. Past the last tile they are empty.
    const auto copy = [&](int tile) {
      const int count = span.end - span.begin - tile * kTileKeys;
      const int64_t offset = int64_t{tile} * kTileKeys * stride;
      if (count > 0) copy_tile<D>(sh.keys[tile % 2], keys + offset, stride, count);
      commit_copies();
      if (count > 0) copy_tile<D>(sh.values[tile % 2], values + offset, stride, count);
      commit_copies();
    };
    PartState<D, M> state;
    state.clear();
    copy(0);
    for (int tile = 0; tile < num_tiles; ++tile) {
      Scores<M> score;
      copy(tile + 1);
      wait_copies<3>();  // these keys have come; their values and the next tile have not
      __syncthreads();
      score_tile(sh, tile % 2, score);
      find_maximum(sh, factor, span.end - span.begin - tile * kTileKeys, score);
      __syncthreads();
      weigh(sh, score, state);
      wait_copies<2>();
      __syncthreads();
      add_values(sh, tile % 2, state);
      __syncthreads();  // the buffer is free
    }
    write_part(lanes, first_lane, sequence, first_item, parts, sh, state);
  }
  commit_copies();
  wait_copies<0>();  // queries that no key wanted
}

// ---- Combination ----

constexpr int kCombineWarps = 4;

template <class T>
__global__ void __launch_bounds__(kCombineWarps* kWarpSize)
    window_attention_combine_kernel(const WindowAttentionParams p, const Parts parts) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t item =
      int64_t{blockIdx.x} * kCombineWarps + static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t num_items = p.num_rows * p.num_heads;
  if (item >= num_items) return;
  const bool is_skipped = p.rows[item / p.num_heads] < 0;
  float2 mine = make_float2(-INFINITY, 0.0f);
  if (lane < parts.num_splits && !is_skipped) mine = parts.softmax[lane * num_items + item];
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

template <class Kernel>
void launch_parts(Kernel* kernel, int lanes_per_block, int num_threads, int64_t shared_bytes,
                  const WindowAttentionParams& p, const Parts& parts, Stream stream) {
  const int64_t lanes = p.num_rows * (p.num_heads / p.num_kv_heads);
  const dim3 grid(blocks_for(lanes, lanes_per_block), static_cast<unsigned int>(parts.num_splits),
                  static_cast<unsigned int>(p.num_kv_heads));
  allow_shared(kernel, shared_bytes, "window_attention");
  kernel<<<grid, num_threads, static_cast<size_t>(shared_bytes), stream>>>(p, parts);
  check_launch("window_attention");
}

template <int D>
void launch_tensor_cores(const WindowAttentionParams& p, const Parts& parts, Stream stream) {
  const auto launch = [&]<int M>() {
    launch_parts(window_attention_part_kernel<D, M>, M, kNumThreads, sizeof(PartShared<D, M>), p,
                 parts, stream);
  };
  const int64_t lanes = p.num_rows * (p.num_heads / p.num_kv_heads);
  if (lanes <= 16) return launch.template operator()<16>();
  if (lanes <= 32) return launch.template operator()<32>();
  launch.template operator()<64>();
}

bool has_tensor_core_form(const WindowAttentionParams& p) {
  const auto fits = [&](const void* x) { return are_vectors<bf16>({x}, {p.head_dim}); };
  return p.dtype == DType::kBFloat16 &&
         (p.head_dim == 32 || p.head_dim == 64 || p.head_dim == 128) && fits(p.q_cache) &&
         fits(p.k_cache) && fits(p.v_cache);
}

template <class T>
void launch(const WindowAttentionParams& p, const Parts& parts, Stream stream) {
  if (!has_tensor_core_form(p)) {
    const int64_t floats = kWarpSize * (2 * p.head_dim + 1) + kPlainLanes * 2 * p.head_dim;
    launch_parts(window_attention_plain_kernel<T>, kPlainLanes, kPlainLanes * kWarpSize,
                 floats * static_cast<int64_t>(sizeof(float)), p, parts, stream);
  } else if (p.head_dim == 32) {
    launch_tensor_cores<32>(p, parts, stream);
  } else if (p.head_dim == 64) {
    launch_tensor_cores<64>(p, parts, stream);
  } else {
    launch_tensor_cores<128>(p, parts, stream);
  }
  window_attention_combine_kernel<T><<<blocks_for(p.num_rows * p.num_heads, kCombineWarps),
                                       kCombineWarps * kWarpSize, 0, stream>>>(p, parts);
  check_launch("window_attention");
}

}  // namespace
}  // namespace cuda::attention

int64_t window_attention_workspace(const WindowAttentionParams& p) {
  const int64_t items =
      cuda::attention_splits(p.num_kv_heads, p.capacity) * p.num_rows * p.num_heads;
  return items * (p.head_dim + 2) * static_cast<int64_t>(sizeof(float));
}

void window_attention_cuda(const WindowAttentionParams& params, Stream stream) {
  if (params.num_rows == 0 || params.num_heads == 0) return;
  cuda::attention::Parts parts{};
  parts.num_splits = static_cast<int>(cuda::attention_splits(params.num_kv_heads, params.capacity));
  const int64_t items = parts.num_splits * params.num_rows * params.num_heads;
  parts.softmax = static_cast<float2*>(params.workspace);
  parts.out = reinterpret_cast<float*>(parts.softmax + items);
  cuda::with_dtype(params.dtype, [&](auto zero) {
    cuda::attention::launch<decltype(zero)>(params, parts, stream);
  });
}

}  // namespace elastic_cache
