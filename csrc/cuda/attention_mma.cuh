// The part kernel of attention with mma.sync, which runs on 8.0 and later: D is head_dim, M lanes a
// block. (attention_wgmma.cuh is the form of 9.0.)
//
// A tile of 64 keys and four warps: a warp computes the scores of 16 keys for all lanes, the warps
// agree on the maximum, weights go through shared memory as bf16, and then a warp computes D / 4
// columns of the output from all 64 keys. K and V are read once from shared memory however many
// lanes there are.
// The subtle thing: nothing a lane's result goes through depends on which lanes, or how many, are
// beside it. Rows of several sequences in a block: it runs over the keys of each, computing all
// lanes, and writes those the keys belong to.
#pragma once

#include "attention_mma_tile.cuh"

namespace elastic_cache::cuda::attention {

// One block: `run` takes the keys of one sequence after the other.
template <int D, int M>
class MmaPart {
 public:
  using Shared = PartShared<D, M>;

  __device__ MmaPart(const WindowAttentionParams& p, const Parts& parts, Shared& sh)
      : p_(p),
        parts_(parts),
        sh_(sh),
        lanes_(p, static_cast<int>(blockIdx.z)),
        first_lane_(static_cast<int>(blockIdx.x) * M),
        split_(static_cast<int>(blockIdx.y)),
        first_item_(split_ * p.num_rows * p.num_heads),
        stride_(p.num_kv_heads * D),
        factor_(p.scale * kLog2E) {}

  __device__ void run() {
    // Before anything is known of the rows: most calls are of one sequence, the first.
    KeySpan span = split_keys(keys_of(p_.key_range, 0), split_, parts_.num_splits);
    copy_keys(0, span, 0);
    copy_queries(p_, lanes_, first_lane_, sh_);
    commit_copies();
    copy_values(0, span, 0);
    commit_copies();
    __syncthreads();
    bool is_first = true;
    for (int sequence = next_sequence(sh_.sequences, M, -1); sequence != kNoSequence;
         sequence = next_sequence(sh_.sequences, M, sequence)) {
      if (!is_first || sequence != 0) {
        wait_copies<0>();
        __syncthreads();  // what is under way goes to the same place
        span = split_keys(keys_of(p_.key_range, sequence), split_, parts_.num_splits);
        copy_keys(sequence, span, 0);
        commit_copies();
        copy_values(sequence, span, 0);
        commit_copies();
      }
      is_first = false;
      run_sequence(sequence, span);
    }
    wait_copies<0>();  // of what no key wanted
  }

 private:
  __device__ const bf16* tile_of(const void* cache, int sequence, const KeySpan& span,
                                 int tile) const {
    const int64_t slot = sequence * p_.capacity + span.begin + int64_t{tile} * kTileKeys;
    return static_cast<const bf16*>(cache) + slot * stride_ + static_cast<int>(blockIdx.z) * D;
  }
  __device__ const bf16* key_row(int tile) const {
    const int first_key = static_cast<int>(threadIdx.x) / kWarpSize * kKeysPerWarp;
    return &sh_.keys[tile % 2][first_key + b_row()][b_column()];
  }
  __device__ static int count_of(const KeySpan& span, int tile) {
    return span.end - span.begin - tile * kTileKeys;
  }
  __device__ void copy_keys(int sequence, const KeySpan& span, int tile) const {
    const int count = count_of(span, tile);
    if (count > 0) {
      copy_tile<D, kNumThreads>(sh_.keys[tile % 2], tile_of(p_.k_cache, sequence, span, tile),
                                stride_, count);
    }
  }
  __device__ void copy_values(int sequence, const KeySpan& span, int tile) const {
    const int count = count_of(span, tile);
    if (count > 0) {
      copy_tile<D, kNumThreads>(sh_.values[tile % 2], tile_of(p_.v_cache, sequence, span, tile),
                                stride_, count);
    }
  }

  // Two groups a tile, its keys and its values; those of the first are under way.
  __device__ void run_sequence(int sequence, const KeySpan& span) {
    const int num_tiles = max(span.end - span.begin + kTileKeys - 1, 0) / kTileKeys;
    PartState<D, M> state;
    state.clear();
    for (int tile = 0; tile < num_tiles; ++tile) {
      const int count = count_of(span, tile);
      Scores<M> score;
      copy_keys(sequence, span, tile + 1);
      commit_copies();
      copy_values(sequence, span, tile + 1);
      commit_copies();
      wait_copies<3>();  // these keys have come; their values and the next tile have not
      __syncthreads();
      score_tile<D, M>(key_row(tile), sh_.queries, score);
      find_maximum(sh_, factor_, count, score);
      __syncthreads();
      weigh(sh_, score, state);
      wait_copies<2>();
      __syncthreads();
      add_values(sh_, tile % 2, state);
      __syncthreads();  // the buffer is free
    }
    if (num_tiles == 0) {
      write_nothing(sequence);
    } else {
      write_part(lanes_, first_lane_, sequence, first_item_, parts_, sh_, state);
    }
  }

  __device__ void write_nothing(int sequence) const {
    for (int m = static_cast<int>(threadIdx.x); m < M; m += kNumThreads) {
      if (sh_.sequences[m] != sequence) continue;
      parts_.softmax[first_item_ + lanes_.item(first_lane_ + m)] = make_float2(-INFINITY, 0.0f);
    }
  }

  const WindowAttentionParams& p_;
  const Parts& parts_;
  Shared& sh_;
  LaneMap lanes_;
  int first_lane_;
  int split_;
  int64_t first_item_;
  int64_t stride_;
  float factor_;
};

template <int D, int M>
__global__ void __launch_bounds__(kNumThreads, 2)
    attention_mma_kernel(const WindowAttentionParams p, const Parts parts) {
  extern __shared__ __align__(16) unsigned char memory[];
  wait_for_previous();
  MmaPart<D, M>(p, parts, *reinterpret_cast<PartShared<D, M>*>(memory)).run();
}

}  // namespace elastic_cache::cuda::attention
