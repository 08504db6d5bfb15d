// A block's share of a tile of lanes: shared memory, scores, softmax, weights x values.
//
// A warp owns 32 keys and holds them as B fragments; 16 lanes are an A fragment, so that scores and
// weights of a thread's keys stay in registers. For weights x values a warp owns 32 or 16 columns
// and reads all weights of the block from shared memory.
// The subtle thing is what lies where: queries and weights of a tile give way to its share of the
// output, which other blocks read; values give way to old queries after the last tile.
// Products that are added to something say how they round: the kernels with and without drift
// must not be contracted differently.
#pragma once

#include <cmath>

#include "common/cluster.cuh"
#include "common/heuristics.h"
#include "common/mma.cuh"
#include "common/reduce.cuh"

namespace elastic_cache::cuda::cluster {

using bf16 = __nv_bfloat16;

constexpr int kLanes = 64;                // of a tile
constexpr int kTileGroups = kLanes / 16;  // A fragments of a tile
constexpr int kWarpKeys = 32;
constexpr int kCopyKeys = 64;  // keys are copied, and values multiplied, so many at a time

template <int D, int W>
struct alignas(16) Shared {
  static constexpr int kKeys = W * kWarpKeys;
  static constexpr int kWidth = D + kRowPad;
  static constexpr int kMaxRanks = W == 4 ? 8 : 16;  // see cluster_shape
  struct Tile {
    bf16 queries[kLanes][kWidth];
    bf16 weights[kLanes][kKeys + kRowPad];
  };
  bf16 keys[kKeys][kWidth];
  union {
    bf16 values[kKeys][kWidth];
    bf16 old_queries[kLanes][kWidth];
  };
  union {
    Tile tile;
    float partial[kLanes][D + 8];  // this block's share of the output
  };
  float2 softmax[kMaxRanks][kLanes];  // of every block, written by them
  float2 warp_softmax[W][kLanes];
  float lse[kLanes];  // base 2; +infinity where there is no key
  int place[kLanes];
  int rows[kClusterRows];  // of this sequence: row << 16 | position
  int counts[W];
};

// A thread's scores, and the maxima of its rows: those of a C fragment, [half] eight apart.
using Scores = float[kTileGroups][kWarpKeys / 8][4];
using Maxima = float[kTileGroups][2];

__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ inline int warp_index() { return static_cast<int>(threadIdx.x) / kWarpSize; }
__device__ inline int warp_key() { return warp_index() * kWarpKeys; }
// The lane of a row of a C fragment, and the thread's first key of a pair.
__device__ inline int tile_lane(int m, int half) { return m * 16 + half * 8 + lane_index() / 4; }
__device__ inline int pair(int n) { return warp_key() + n * 8 + lane_index() % 4 * 2; }

// Products of this warp's keys and the tile's lanes.
template <int D, int W>
__device__ inline void score(const Shared<D, W>& sh, const bf16 (&queries)[kLanes][D + kRowPad],
                             int num_keys, int count, Scores& x) {
  uint32_t keys[D / 16][2][4];
  const bool has_keys = warp_key() < num_keys;
#pragma unroll
  for (int d = 0; d < D / 16; ++d) {
#pragma unroll
    for (int half = 0; half < 2 && has_keys; ++half) {
      load_matrices(keys[d][half], &sh.keys[warp_key() + half * 16 + b_row()][d * 16 + b_column()]);
    }
  }
#pragma unroll
  for (int m = 0; m < kTileGroups; ++m) {
#pragma unroll
    for (int i = 0; i < kWarpKeys / 2; ++i) x[m][i / 4][i % 4] = 0.0f;
    if (m * 16 >= count || !has_keys) continue;
    constexpr int kSteps = D / 16 < 4 ? D / 16 : 4;  // loaded together
#pragma unroll
    for (int first = 0; first < D / 16; first += kSteps) {
      uint32_t q[kSteps][4];
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        load_matrices(q[i], &queries[m * 16 + a_row()][(first + i) * 16 + a_column()]);
      }
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
#pragma unroll
        for (int n = 0; n < kWarpKeys / 8; ++n) {
          const uint32_t (&k)[4] = keys[first + i][n / 2];
          multiply_add(x[m][n], q[i], k[n % 2 * 2], k[n % 2 * 2 + 1]);
        }
      }
    }
  }
}

// Scores to exp2(score - the warp's maximum of the lane); maximum and sum to shared memory.
template <int D, int W>
__device__ inline void exponentiate(Shared<D, W>& sh, float factor, int num_keys, int count,
                                    Scores& x, Maxima& top) {
#pragma unroll
  for (int m = 0; m < kTileGroups; ++m) {
    top[m][0] = top[m][1] = -INFINITY;
    if (m * 16 >= count) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = -INFINITY;
#pragma unroll
      for (int i = 0; i < kWarpKeys / 4; ++i) {
        float& score = x[m][i / 2][half * 2 + i % 2];
        score = pair(i / 2) + i % 2 < num_keys ? __fmul_rn(score, factor) : -INFINITY;
        largest = fmaxf(largest, score);
      }
      largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 2));
      const float base = largest == -INFINITY ? 0.0f : largest;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kWarpKeys / 4; ++i) {
        float& score = x[m][i / 2][half * 2 + i % 2];
        score = exp2_approximate(score - base);
        sum += score;
      }
      sum += __shfl_xor_sync(kFullWarp, sum, 1);
      sum += __shfl_xor_sync(kFullWarp, sum, 2);
      top[m][half] = largest;
      if (lane_index() % 4 == 0) {
        sh.warp_softmax[warp_index()][tile_lane(m, half)] = make_float2(largest, sum);
      }
    }
  }
}

// Maximum and sum of `count` pairs, `stride` apart, in their order.
__device__ inline float2 join_pairs(const float2* from, int stride, int count) {
  float top = -INFINITY, sum = 0.0f;
#pragma unroll 8
  for (int i = 0; i < count; ++i) top = fmaxf(top, from[i * stride].x);
  const float base = top == -INFINITY ? 0.0f : top;
#pragma unroll 8
  for (int i = 0; i < count; ++i) {
    const float2 x = from[i * stride];
    sum = __fmaf_rn(exp2_approximate(x.x - base), x.y, sum);
  }
  return make_float2(top, sum);
}

// What a warp has of the output of a tile: 32 columns with four warps, 16 with eight, and as many
// lanes as are left then.
template <int D, int W>
struct Columns {
  static constexpr int kColumns = 128 / W;
  static constexpr int kColumnWarps = D / kColumns;
  static constexpr int kLaneWarps = W / kColumnWarps;
  static constexpr int kGroups = kTileGroups / kLaneWarps;
  static_assert(kLaneWarps * kColumnWarps == W && kGroups * kLaneWarps == kTileGroups);

  __device__ static int first() { return warp_index() % kColumnWarps * kColumns; }
  __device__ static int group(int i) { return i * kLaneWarps + warp_index() / kColumnWarps; }
};

template <int D, int W>
using Output = float[Columns<D, W>::kGroups][Columns<D, W>::kColumns / 8][4];

// Weights x values: this warp's columns, for its lanes.
template <int D, int W>
__device__ inline void add_values(const Shared<D, W>& sh, int num_keys, int count,
                                  Output<D, W>& out) {
  using O = Columns<D, W>;
  constexpr int kSteps = kCopyKeys / 16;
  for (int first = 0; first < num_keys; first += kCopyKeys) {
    uint32_t v[kSteps][O::kColumns / 16][4], w[kSteps][4];
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int n = 0; n < O::kColumns / 16; ++n) {
        load_matrices_transposed(
            v[k][n], &sh.values[first + k * 16 + a_row()][O::first() + n * 16 + a_column()]);
      }
    }
#pragma unroll
    for (int i = 0; i < O::kGroups; ++i) {
      if (O::group(i) * 16 >= count) continue;
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        load_matrices(w[k],
                      &sh.tile.weights[O::group(i) * 16 + a_row()][first + k * 16 + a_column()]);
      }
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
#pragma unroll
        for (int n = 0; n < O::kColumns / 8; ++n) {
          const uint32_t (&b)[4] = v[k][n / 2];
          multiply_add(out[i][n], w[k], b[n % 2 * 2], b[n % 2 * 2 + 1]);
        }
      }
    }
  }
}

template <int D, int W>
__device__ inline void keep_partial(Shared<D, W>& sh, int count, const Output<D, W>& out) {
  using O = Columns<D, W>;
#pragma unroll
  for (int i = 0; i < O::kGroups; ++i) {
    if (O::group(i) * 16 >= count) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* to = &sh.partial[tile_lane(O::group(i), half)][O::first() + lane_index() % 4 * 2];
#pragma unroll
      for (int n = 0; n < O::kColumns / 8; ++n) {
        *reinterpret_cast<float2*>(to + n * 8) =
            make_float2(out[i][n][half * 2], out[i][n][half * 2 + 1]);
      }
    }
  }
}

}  // namespace elastic_cache::cuda::cluster
