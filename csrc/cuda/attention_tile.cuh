// Tiles of 64 keys or values in shared memory, for kernels with mma.sync; D is head_dim.
#pragma once

#include "common/heuristics.h"
#include "common/mma.cuh"

namespace elastic_cache::cuda::attention {

using bf16 = __nv_bfloat16;

template <int D>
using Tile = bf16[kTileKeys][D + kRowPad];

// Starts copying `count` rows of D elements, `stride` apart, with the block's kThreads threads;
// rows beyond them become zero: a weight of zero times what lies behind the key range must not be
// NaN.
template <int D, int kThreads>
__device__ inline void copy_tile(Tile<D>& tile, const bf16* from, int64_t stride, int count) {
  constexpr int kVectors = D / 8, kStep = kThreads / kVectors;
  static_assert(kTileKeys % kStep == 0);
  const int first = static_cast<int>(threadIdx.x) / kVectors;
  const int column = static_cast<int>(threadIdx.x) % kVectors * 8;
  const bf16* at = from + first * stride + column;
#pragma unroll
  for (int key = 0; key < kTileKeys; key += kStep, at += kStep * stride) {
    const bool is_valid = first + key < count;
    copy_async(&tile[first + key][column], is_valid ? at : from, is_valid);
  }
}

template <int M>
using Scores = float[M / 16][2][4];

// Products of this warp's 16 keys with M queries; `key_row` is where this thread's part of a key
// fragment begins: row b_row() of the 16, column b_column(). Unrolled further it takes
// more registers than the drift statistics have.
template <int D, int M>
__device__ inline void score_tile(const bf16* key_row, const bf16 (*queries)[D + kRowPad],
                                  Scores<M>& score) {
#pragma unroll
  for (int m = 0; m < M / 16; ++m) {
#pragma unroll
    for (int i = 0; i < 8; ++i) score[m][i / 4][i % 4] = 0.0f;
  }
#pragma unroll(D / 32)
  for (int d = 0; d < D; d += 16) {
    uint32_t k[4], q[4];
    load_matrices(k, key_row + d);
#pragma unroll
    for (int m = 0; m < M / 16; ++m) {
      load_matrices(q, &queries[m * 16 + a_row()][d + a_column()]);
      multiply_add(score[m][0], q, k[0], k[1]);
      multiply_add(score[m][1], q, k[2], k[3]);
    }
  }
}

}  // namespace elastic_cache::cuda::attention
