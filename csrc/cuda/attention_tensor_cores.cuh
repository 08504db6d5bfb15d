// The part kernel of attention on tensor cores, for window_attention and drift_attention: D is
// head_dim, M lanes a block.
//
// A tile of 64 keys and four warps: a warp computes the scores of 16 keys for all lanes, the warps
// agree on the maximum, weights go through shared memory as bf16, and then a warp computes D / 4
// columns of the output from all 64 keys. K and V are read once from shared memory however many
// lanes there are. With kDrift scores are kept as well (attention_kept.cuh).
// The subtle thing: nothing a lane's result goes through depends on which lanes, or how many, are
// beside it. Rows of several sequences in a block: it runs over the keys of each, computing all
// lanes, and writes those the keys belong to.
#pragma once

#include "attention_kept.cuh"
#include "attention_tile.cuh"

namespace elastic_cache::cuda::attention {

// One block: `run` takes the keys of one sequence after the other.
template <int D, int M, bool kDrift>
class Part {
 public:
  using Shared = PartShared<D, M, kDrift>;

  __device__ Part(const WindowAttentionParams& p, const Parts& parts, const DriftParts& drift,
                  Shared& sh)
      : p_(p),
        parts_(parts),
        drift_(drift),
        sh_(sh),
        lanes_(p, static_cast<int>(blockIdx.z)),
        first_lane_(static_cast<int>(blockIdx.x) * M),
        split_(static_cast<int>(blockIdx.y)),
        first_item_(split_ * p.num_rows * p.num_heads),
        stride_(p.num_kv_heads * D),
        factor_(p.scale * kLog2E) {}

  __device__ void run() {
    // Before anything is known of the rows: most calls are of one sequence, the first.
    KeySpan span = split_keys(p_.key_range, 0, split_, parts_.num_splits);
    copy_keys(0, span, 0);
    copy_queries(p_, drift_, lanes_, first_lane_, sh_);
    if constexpr (kDrift) copy_old_queries(p_, drift_, lanes_, sh_.old);
    commit_copies();
    copy_values(0, span, 0);
    commit_copies();
    __syncthreads();
    bool is_first = true;
    for (int sequence = next(-1); sequence != kNoSequence; sequence = next(sequence)) {
      if (!is_first || sequence != 0) {
        wait_copies<0>();
        __syncthreads();  // what is under way goes to the same place
        span = split_keys(p_.key_range, sequence, split_, parts_.num_splits);
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
  __device__ int next(int after) const {
    int sequence = next_sequence(sh_.sequences, M, after);
    if constexpr (kDrift) {
      sequence = min(sequence, next_sequence(sh_.old.sequences[0], kOldLanes, after));
    }
    return sequence;
  }

  __device__ const bf16* tile_of(const void* cache, int sequence, const KeySpan& span,
                                 int tile) const {
    const int64_t slot = sequence * p_.capacity + span.begin + int64_t{tile} * kTileKeys;
    return static_cast<const bf16*>(cache) + slot * stride_ + static_cast<int>(blockIdx.z) * D;
  }
  __device__ static int count_of(const KeySpan& span, int tile) {
    return span.end - span.begin - tile * kTileKeys;
  }
  __device__ void copy_keys(int sequence, const KeySpan& span, int tile) const {
    const int count = count_of(span, tile);
    if (count > 0) {
      copy_tile<D>(sh_.keys[tile % 2], tile_of(p_.k_cache, sequence, span, tile), stride_, count);
    }
  }
  __device__ void copy_values(int sequence, const KeySpan& span, int tile) const {
    const int count = count_of(span, tile);
    if (count > 0) {
      copy_tile<D>(sh_.values[tile % 2], tile_of(p_.v_cache, sequence, span, tile), stride_, count);
    }
  }

  // Two groups a tile, its keys and its values; those of the first are under way.
  __device__ void run_sequence(int sequence, const KeySpan& span) {
    const int num_tiles = max(span.end - span.begin + kTileKeys - 1, 0) / kTileKeys;
    if constexpr (kDrift) rows_.load(p_, drift_, sequence);
    PartState<D, M> state;
    state.clear();
    for (int tile = 0; tile < num_tiles; ++tile) {
      const int count = count_of(span, tile);
      Scores<M> score;
      copy_keys(sequence, span, tile + 1);
      if constexpr (kDrift) {
        if (tile + 1 == num_tiles)
          copy_overwritten(rows_.share(split_, parts_.num_splits), num_tiles);
      }
      commit_copies();
      copy_values(sequence, span, tile + 1);
      commit_copies();
      wait_copies<3>();  // these keys have come; their values and the next tile have not
      __syncthreads();
      score_tile<D, M>(sh_.keys[tile % 2], sh_.queries, score);
      find_maximum(sh_, factor_, count, score);
      if constexpr (kDrift) {
        keep_scores(p_, drift_, sh_, sequence, span.begin + tile * kTileKeys, count, score);
      }
      __syncthreads();
      weigh(sh_, score, state);
      if constexpr (kDrift) score_old_tile(sequence, span, tile);
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
    if constexpr (kDrift) finish_old(sequence, num_tiles);
  }

  __device__ void score_old_tile(int sequence, const KeySpan& span, int tile) {
    if (!has_old(sequence)) return;
    const int first = span.begin + tile * kTileKeys, count = count_of(span, tile);
    const int first_slot = sequence * static_cast<int>(p_.capacity);
    const uint64_t overwritten = rows_.overwritten(p_, first_slot + first);
    score_old(p_, drift_, sh_, tile % 2, count, sequence, factor_,
              [&](int key) { return key < count && !(overwritten >> key & 1) ? first + key : -1; });
  }

  // Whether any of the block's old lanes is of that sequence: the same answer in every thread.
  __device__ bool has_old(int sequence) const {
    const int mine = sh_.old.sequences[0][static_cast<int>(threadIdx.x) % kOldLanes];
    return __any_sync(kFullWarp, mine == sequence);
  }

  // Starts copying up to a tile of the keys as they were, of rows from rows.x on.
  __device__ void copy_overwritten(const int2& rows, int tile) const {
    const auto* from = static_cast<const bf16*>(drift_.k_old) + rows.x * stride_ +
                       static_cast<int>(blockIdx.z) * D;
    if (rows.x < rows.y && has_any_old()) {
      copy_tile<D>(sh_.keys[tile % 2], from, stride_, rows.y - rows.x);
    }
  }

  // The keys as they were of this split's share of the rows, the first tile of which is on its way
  // if there were any tiles of the cache.
  __device__ void finish_old(int sequence, int num_tiles) {
    if (!has_old(sequence)) return;
    const int first_key = p_.key_range[2 * sequence], end_key = p_.key_range[2 * sequence + 1];
    const int first_slot = sequence * static_cast<int>(p_.capacity);
    int2 rows = rows_.share(split_, parts_.num_splits);
    for (bool is_copied = num_tiles > 0; rows.x < rows.y; rows.x += kTileKeys, is_copied = false) {
      if (!is_copied) copy_overwritten(rows, num_tiles);
      commit_copies();
      wait_copies<0>();
      __syncthreads();
      const int count = rows.y - rows.x;
      score_old(p_, drift_, sh_, num_tiles % 2, count, sequence, factor_, [&](int key) {
        const int slot = key < count ? p_.rows[rows.x + key] : -1, at = slot - first_slot;
        return slot >= 0 && at >= first_key && at < end_key ? at : -1;
      });
      __syncthreads();
    }
  }
  __device__ bool has_any_old() const {
    const int mine = sh_.old.sequences[0][static_cast<int>(threadIdx.x) % kOldLanes];
    return __any_sync(kFullWarp, mine >= 0);
  }

  __device__ void write_nothing(int sequence) const {
    for (int m = static_cast<int>(threadIdx.x); m < M; m += kNumThreads) {
      if (sh_.sequences[m] != sequence) continue;
      parts_.softmax[first_item_ + lanes_.item(first_lane_ + m)] = make_float2(-INFINITY, 0.0f);
    }
  }

  const WindowAttentionParams& p_;
  const Parts& parts_;
  const DriftParts& drift_;
  Shared& sh_;
  LaneMap lanes_;
  int first_lane_;
  int split_;
  int64_t first_item_;
  int64_t stride_;
  float factor_;
  std::conditional_t<kDrift, SequenceRows, Nothing> rows_;
};

template <int D, int M, bool kDrift>
__global__ void __launch_bounds__(kNumThreads, 2)
    attention_part_kernel(const WindowAttentionParams p, const Parts parts,
                          const DriftParts drift) {
  extern __shared__ __align__(16) unsigned char memory[];
  wait_for_previous();
  if constexpr (kDrift) drift.begin();
  Part<D, M, kDrift>(p, parts, drift, *reinterpret_cast<PartShared<D, M, kDrift>*>(memory)).run();
}

}  // namespace elastic_cache::cuda::attention
