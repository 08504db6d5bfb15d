// The part kernel of attention with a warpgroup's products (compute capability 9.0); D is head_dim.
//
// A warpgroup takes 64 lanes, a warp of it 16, from the scores to the output; weights stay in
// registers. The two warpgroups of a block share the tiles of 64 keys (one without lanes helps to
// copy); as many tiles as fit are on their way at once, and there is one barrier a tile.
// The subtle thing: nothing a lane's result goes through depends on which lanes, or how many, are
// beside it. Rows of several sequences in a block: it runs over the keys of each, every warpgroup
// computing where a lane of its own is concerned.
#pragma once

#include <cmath>

#include "attention_parts.cuh"
#include "common/mma.cuh"
#include "common/reduce.cuh"
#include "common/wgmma.cuh"

namespace elastic_cache::cuda::attention {

constexpr int kGroupLanes = 64;
constexpr int kGroupThreads = 128;
constexpr int kGroups = 2;
constexpr int kBlockLanes = kGroups * kGroupLanes;
constexpr int kBlockThreads = kGroups * kGroupThreads;
constexpr int kStages = 4;

// 64 rows of D elements, as products want them.
template <int D>
struct alignas(1024) Operand {
  static constexpr int kBlockBytes = 64 * wgmma::kBlockRowBytes;
  unsigned char bytes[D / wgmma::kBlockColumns * kBlockBytes];

  __device__ unsigned char* at(int row, int column) {
    return bytes + wgmma::swizzled(row, column, kBlockBytes);
  }
};

template <int D>
struct WgmmaShared {
  Operand<D> keys[kStages];
  Operand<D> values[kStages];
  Operand<D> queries[kGroups];
  int32_t sequences[kBlockLanes];
};
// What a block asks for; its first 1024 bytes may be lost to alignment.
template <int D>
inline constexpr size_t kWgmmaBytes = sizeof(WgmmaShared<D>) + 1024;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

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

  // Scores of a tile, of whose keys `count` are there -> weights as A fragments; what was added
  // before is rescaled.
  __device__ __forceinline__ void weigh(float (&score)[kTileKeys / 8][4], float factor, int count,
                                        uint32_t (&weights)[kTileKeys / 16][4]) {
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
      const float rescale = exp2_flush(max[half] - top);  // 0 for the first tile
      max[half] = top;
      sum[half] *= rescale;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        out[n][half * 2] *= rescale;
        out[n][half * 2 + 1] *= rescale;
      }
#pragma unroll
      for (int n = 0; n < kTileKeys / 8; ++n) {
        const float a = exp2_flush(score[n][half * 2] - top);
        const float b = exp2_flush(score[n][half * 2 + 1] - top);
        sum[half] += a + b;
        weights[n / 2][n % 2 * 2 + half] = packed(a, b);
      }
    }
  }

  __device__ __forceinline__ void add_tile(uint32_t (&queries)[D / 16][4], uint32_t keys,
                                           uint32_t values, float factor, int count) {
    constexpr int kBlockBytes = Operand<D>::kBlockBytes;
    float score[kTileKeys / 8][4] = {};
    wgmma::begin(score, queries);
#pragma unroll
    for (int d = 0; d < D; d += 16) {
      const uint32_t at =
          keys + d / wgmma::kBlockColumns * kBlockBytes + d % wgmma::kBlockColumns * 2;
      wgmma::multiply_transposed(score, queries[d / 16], wgmma::operand<kBlockBytes>(at));
    }
    wgmma::end(score);
    uint32_t weights[kTileKeys / 16][4];
    weigh(score, factor, count, weights);
    wgmma::begin(out, weights);
#pragma unroll
    for (int k = 0; k < kTileKeys; k += 16) {
      const uint32_t at = values + k * wgmma::kBlockRowBytes;
      wgmma::multiply(out, weights[k / 16], wgmma::operand<kBlockBytes>(at));
    }
    wgmma::end(out);
  }
};

// One block: `run` takes the keys of one sequence after the other.
template <int D>
class WgmmaPart {
 public:
  __device__ WgmmaPart(const WindowAttentionParams& p, const Parts& parts, unsigned char* memory)
      : p_(p),
        parts_(parts),
        sh_(*reinterpret_cast<WgmmaShared<D>*>(memory +
                                               (1024 - shared_address(memory) % 1024) % 1024)),
        lanes_(p, static_cast<int>(blockIdx.z)),
        first_lane_(static_cast<int>(blockIdx.x) * kBlockLanes),
        stride_(p.num_kv_heads * D) {}

  __device__ void run() const {
    // Before anything is known of the rows: most calls are of one sequence, the first.
    KeySpan span = span_of(0);
    copy_tile(p_.k_cache, 0, span, 0, sh_.keys[0]);
    copy_queries();
    copy_tile(p_.v_cache, 0, span, 0, sh_.values[0]);
    commit_copies();
    for (int tile = 1; tile < kStages; ++tile) copy(0, span, tile);
    __syncthreads();
    bool is_first = true;
    for (int sequence = next(-1); sequence != kNoSequence; sequence = next(sequence)) {
      if (!is_first || sequence != 0) {
        wait_copies<0>();
        __syncthreads();  // what is under way goes to the same place
        span = span_of(sequence);
        for (int tile = 0; tile < kStages; ++tile) copy(sequence, span, tile);
      }
      is_first = false;
      run_sequence(sequence, span);
    }
    wait_copies<0>();  // of what no key wanted
  }

 private:
  __device__ static int thread() { return static_cast<int>(threadIdx.x) % kWarpSize; }
  __device__ static int group() { return static_cast<int>(threadIdx.x) / kGroupThreads; }
  // The warp's first lane of the 64 of its group.
  __device__ static int warp_lane() {
    return static_cast<int>(threadIdx.x) % kGroupThreads / kWarpSize * 16;
  }
  __device__ int next(int after) const { return next_sequence(sh_.sequences, kBlockLanes, after); }
  __device__ KeySpan span_of(int sequence) const {
    return split_keys(p_.key_range, sequence, static_cast<int>(blockIdx.y), parts_.num_splits);
  }

  __device__ void copy_queries() const {
    const auto* queries = static_cast<const __nv_bfloat16*>(p_.q_cache);
    const int first = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int i = 0; i < kBlockLanes * (D / 8) / kBlockThreads; ++i) {
      const int at = first + i * kBlockThreads;
      const int m = at / (D / 8), column = at % (D / 8) * 8;
      const int slot = lanes_.slot(p_, first_lane_ + m);
      const int64_t from =
          slot < 0 ? 0 : (int64_t{slot} * lanes_.num_heads + lanes_.head(first_lane_ + m)) * D;
      copy_async(sh_.queries[m / kGroupLanes].at(m % kGroupLanes, column), queries + from + column,
                 slot >= 0);
    }
    for (int m = first; m < kBlockLanes; m += kBlockThreads) {
      sh_.sequences[m] = lanes_.sequence(p_, first_lane_ + m);
    }
  }

  // Starts copying a tile; keys beyond the range become zero: a weight of zero times what lies
  // there must not be NaN.
  __device__ void copy_tile(const void* cache, int sequence, const KeySpan& span, int tile,
                            Operand<D>& to) const {
    const int count = span.end - span.begin - tile * kTileKeys;
    if (count <= 0) return;
    const int64_t slot = sequence * p_.capacity + span.begin + int64_t{tile} * kTileKeys;
    const auto* from = static_cast<const __nv_bfloat16*>(cache) + slot * stride_ +
                       static_cast<int>(blockIdx.z) * D;
    constexpr int kStep = kBlockThreads / (D / 8);
    const int first = static_cast<int>(threadIdx.x) / (D / 8);
    const int column = static_cast<int>(threadIdx.x) % (D / 8) * 8;
    const auto* at = from + first * stride_ + column;
#pragma unroll
    for (int i = 0; i < kTileKeys / kStep; ++i, at += kStep * stride_) {
      const int key = first + i * kStep;
      copy_async(to.at(key, column), key < count ? at : from, key < count);
    }
  }
  __device__ void copy(int sequence, const KeySpan& span, int tile) const {
    copy_tile(p_.k_cache, sequence, span, tile, sh_.keys[tile % kStages]);
    copy_tile(p_.v_cache, sequence, span, tile, sh_.values[tile % kStages]);
    commit_copies();
  }

  // The first kStages tiles are under way, a group each.
  __device__ __forceinline__ void run_sequence(int sequence, const KeySpan& span) const {
    const int num_tiles = (max(span.end - span.begin, 0) + kTileKeys - 1) / kTileKeys;
    const int* mine = sh_.sequences + group() * kGroupLanes;
    const bool is_mine =
        __any_sync(kFullWarp, mine[thread()] == sequence || mine[thread() + kWarpSize] == sequence);
    const float factor = p_.scale * kLog2E;
    uint32_t queries[D / 16][4];
    LaneState<D> state;
    state.clear();
    for (int tile = 0; tile < num_tiles; ++tile) {
      if (tile == 0) {
        wait_copies<kStages - 1>();
      } else {
        wait_copies<kStages - 2>();
      }
      wgmma::publish_operands();
      __syncthreads();  // the tile is there, and the one before it is done with
      if (tile == 0) load_queries(queries);
      if (tile > 0) copy(sequence, span, tile - 1 + kStages);
      if (!is_mine) continue;
      state.add_tile(queries, shared_address(&sh_.keys[tile % kStages]),
                     shared_address(&sh_.values[tile % kStages]), factor,
                     span.end - span.begin - tile * kTileKeys);
    }
    if (is_mine) write(sequence, state);
  }

  __device__ __forceinline__ void load_queries(uint32_t (&queries)[D / 16][4]) const {
#pragma unroll
    for (int d = 0; d < D; d += 16) {
      load_matrices(queries[d / 16], reinterpret_cast<const __nv_bfloat16*>(sh_.queries[group()].at(
                                         warp_lane() + a_row(), d + a_column())));
    }
  }

  // The parts of lanes of that sequence.
  __device__ __forceinline__ void write(int sequence, LaneState<D>& state) const {
    const int64_t first_item = blockIdx.y * p_.num_rows * p_.num_heads;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = state.sum[half];
      sum += __shfl_xor_sync(kFullWarp, sum, 1);
      sum += __shfl_xor_sync(kFullWarp, sum, 2);
      const int m = group() * kGroupLanes + warp_lane() + half * 8 + thread() / 4;
      if (sh_.sequences[m] != sequence) continue;
      const int64_t item = first_item + lanes_.item(first_lane_ + m);
      if (thread() % 4 == 0) parts_.softmax[item] = make_float2(state.max[half], sum);
      float* to = parts_.out + item * D + thread() % 4 * 2;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        *reinterpret_cast<float2*>(to + n * 8) =
            make_float2(state.out[n][half * 2], state.out[n][half * 2 + 1]);
      }
    }
  }

  const WindowAttentionParams& p_;
  const Parts& parts_;
  WgmmaShared<D>& sh_;
  LaneMap lanes_;
  int first_lane_;
  int64_t stride_;
};
#endif

template <int D>
__global__ void __launch_bounds__(kBlockThreads, 1)
    attention_wgmma_kernel(const WindowAttentionParams p, const Parts parts) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(16) unsigned char memory[];
  wait_for_previous();
  WgmmaPart<D>(p, parts, memory).run();
#endif
}

}  // namespace elastic_cache::cuda::attention
