// Pieces of attention's part kernel with mma.sync: what a block keeps in shared memory, and what
// its four warps do with a tile of 64 keys. D is head_dim, M lanes a block.
#pragma once

#include <cmath>

#include "attention_parts.cuh"
#include "attention_tile.cuh"
#include "common/mma.cuh"
#include "common/reduce.cuh"

namespace elastic_cache::cuda::attention {

constexpr int kNumWarps = 4;
constexpr int kNumThreads = kNumWarps * kWarpSize;
constexpr int kKeysPerWarp = kTileKeys / kNumWarps;
static_assert(kKeysPerWarp == 16, "a warp's scores are two B fragments wide");

template <int D, int M>
struct alignas(16) PartShared {
  Tile<D> keys[2];
  Tile<D> values[2];
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
      const float rescale = exp2_flush(state.max[m][half] - top);  // 0 for the first tile
      state.max[m][half] = top;
#pragma unroll
      for (int n = 0; n < D / 32; ++n) {
        state.out[m][n][half * 2] *= rescale;
        state.out[m][n][half * 2 + 1] *= rescale;
      }
      float total = 0.0f;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float a = exp2_flush(score[m][n][half * 2] - top);
        const float b = exp2_flush(score[m][n][half * 2 + 1] - top);
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

}  // namespace elastic_cache::cuda::attention
