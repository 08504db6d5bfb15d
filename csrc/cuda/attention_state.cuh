// What a thread of attention's form with a warpgroup's products keeps of its lanes while it runs
// over the keys; D is head_dim.
#pragma once

#include <cmath>

#include "common/heuristics.h"
#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace elastic_cache::cuda::attention {

// A warp's 16 lanes; [half] are the rows lane / 4 and lane / 4 + 8 of a C fragment. `sum` is this
// thread's part.
template <int D>
struct LaneState {
  float out[D / 8][4];
  float max[2];
  float sum[2];

  __device__ __forceinline__ void clear() {
    max[0] = max[1] = -INFINITY;
    sum[0] = sum[1] = 0.0f;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) out[n][0] = out[n][1] = out[n][2] = out[n][3] = 0.0f;
  }

  // Scores of a tile, of whose keys `count` are there -> weights, and by what all before them is
  // to be multiplied.
  __device__ __forceinline__ void weigh(float (&score)[kTileKeys / 8][4], float factor, int count,
                                        float (&rescale)[2]) {
    const int first_key = static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = max[half];
#pragma unroll
      for (int i = 0; i < kTileKeys / 4; ++i) {
        float& x = score[i / 2][half * 2 + i % 2];
        x = first_key + i / 2 * 8 + i % 2 < count ? x * factor : -INFINITY;
        top = fmaxf(top, x);
      }
      top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 2));
      rescale[half] = exp2_flush(max[half] - top);  // 0 for the first tile
      max[half] = top;
      sum[half] *= rescale[half];
#pragma unroll
      for (int n = 0; n < kTileKeys / 8; ++n) {
        float& a = score[n][half * 2];
        float& b = score[n][half * 2 + 1];
        a = exp2_flush(a - top);
        b = exp2_flush(b - top);
        sum[half] += a + b;
      }
    }
  }

  __device__ __forceinline__ void scale(const float (&rescale)[2]) {
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] *= rescale[i / 2];
    }
  }
};

}  // namespace elastic_cache::cuda::attention
