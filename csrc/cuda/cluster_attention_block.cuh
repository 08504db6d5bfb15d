// What a block does in cluster_attention.cu, which says how the blocks work together.
//
// A tile of lanes (row, query head of the group) at a time, in the order of the row list:
//   scores, maximum and sum of every warp and then of every block -> log-sum-exp
//   weights, normalised; masses of window rows in registers, p_new of tracked rows to the workspace
//   weights x values of every block; each block adds up its share of the lanes
// and then tiles of the tracked rows as they were: scores -> p_old.
// The subtle thing: keys that this step overwrote are put back in place, once the last scores of
// the cache as it is are known; nothing but the old rows sees them.
#pragma once

#include <climits>
#include <cmath>

#include "cluster_attention.h"
#include "cluster_attention_tile.cuh"
#include "common/cluster.cuh"
#include "common/heuristics.h"
#include "common/mma.cuh"
#include "common/reduce.cuh"
#include "drift_attention_sequence.cuh"

namespace elastic_cache::cuda::cluster {

using drift::kLog2E;

constexpr float kLn2 = 0.69314718055994530942f;

// What a lane's probabilities are for, beyond its output.
constexpr int kNothing = -2, kMass = -1;  // else: the row of the workspace to write them to

template <int D, int W, bool kDrift>
class Block {
 public:
  using Mine = Shared<D, W>;

  __device__ Block(const DriftAttentionParams& p, const Workspace& w, Mine& sh)
      : p_(p),
        w_(w),
        sh_(sh),
        thread_(static_cast<int>(threadIdx.x)),
        rank_(static_cast<int>(blockIdx.x)),
        num_ranks_(static_cast<int>(gridDim.x)),
        kv_head_(static_cast<int>(blockIdx.y)),
        sequence_(static_cast<int>(blockIdx.z)),
        group_(static_cast<int>(p.num_heads / p.num_kv_heads)),
        num_heads_(static_cast<int>(p.num_heads)),
        capacity_(static_cast<int>(p.capacity)) {}

  // Every thread of every block of the cluster passes the same barriers: what the loops run over
  // is the sequence's, not the block's.
  __device__ void run() {
    cluster_arrive();
    begin();
    const int num_now = (num_rows_ * group_ + kLanes - 1) / kLanes;
    const int num_old = kDrift ? (num_tracked_ * group_ + kLanes - 1) / kLanes : 0;
    float mass[kWarpKeys / 8][2] = {};
    for (int tile = 0; tile < num_now; ++tile) {
      cluster_wait();  // all blocks run, and none reads this one's share of the last tile
      if (tile == 0) {
        wait_copies<1>();  // values may still be on their way
      } else {
        copy_queries(tile, false);
        wait_copies<0>();
      }
      __syncthreads();
      attend(tile, tile == num_now - 1 && num_old > 0, mass);
      cluster_arrive();
    }
    if constexpr (kDrift) {
      for (int tile = 0; tile < num_old; ++tile) {
        cluster_wait();
        wait_copies<0>();
        __syncthreads();
        attend_old(tile, tile < num_old - 1);
        cluster_arrive();
      }
      write_mass(mass);
    }
    cluster_wait();  // shared memory stays until nobody reads it
    wait_copies<0>();
  }

 private:
  static constexpr int kThreads = W * kWarpSize;
  static constexpr int kVectors = D / 8;
  static constexpr int kSlots = kClusterRows / kThreads;

  // ---- The block's keys, the sequence's rows ----

  // Loads that do not depend on each other come first, copies in the order they are wanted.
  __device__ void begin() {
    int slots[kSlots];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int row = i * kThreads + thread_;
      slots[i] = row < p_.num_rows ? p_.rows[row] : INT_MAX;
    }
    int first = p_.key_range[2 * sequence_];
    const int num_keys = max(p_.key_range[2 * sequence_ + 1] - first, 0);
    if constexpr (kDrift) find_segment();
    const int share = ((num_keys + num_ranks_ - 1) / num_ranks_ + 15) / 16 * 16;
    index_ = rank_ * share;
    position_ = first + index_;
    count_ = min(max(num_keys - index_, 0), share);
    copy_cache(sh_.keys, p_.k_cache);
    commit_copies();
    list_rows(slots);
    if (num_rows_ > 0) copy_queries(0, false);
    copy_cache(sh_.values, p_.v_cache);
    commit_copies();
  }

  __device__ void find_segment() {
    const drift::Sequence q(p_, w_.max_tracked, sequence_);
    begin_ = q.begin, end_tracked_ = q.begin + q.num_tracked;
    window_ = q.window, end_window_ = q.window + q.num_window, end_ = q.end;
    first_tracked_ = q.first_tracked;
    if (kv_head_ == 0 && rank_ == 0 && thread_ == 0) w_.finished[sequence_] = 0;
  }

  // Rows behind the block's keys become zero: a weight of zero times them must not be NaN.
  __device__ void copy_cache(bf16 (&tile)[Mine::kKeys][D + kRowPad], const void* cache) const {
    const int64_t stride = p_.num_kv_heads * D;
    const int64_t slot = int64_t{sequence_} * capacity_ + (count_ > 0 ? position_ : 0);
    const auto* from = static_cast<const bf16*>(cache) + slot * stride + kv_head_ * D;
    const int num_vectors = (count_ + kCopyKeys - 1) / kCopyKeys * kCopyKeys * kVectors;
#pragma unroll 4
    for (int at = thread_; at < num_vectors; at += kThreads) {
      const int key = at / kVectors, column = at % kVectors * 8;
      const bool is_valid = key < count_;
      copy_async(&tile[key][column], from + (is_valid ? key : 0) * stride + column, is_valid);
    }
  }

  // The sequence's rows in their order, and where among them the tracked ones begin.
  __device__ void list_rows(const int (&slots)[kSlots]) {
    num_rows_ = first_old_ = num_tracked_ = 0;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      if (i * kThreads >= p_.num_rows) break;
      const int row = i * kThreads + thread_, position = slots[i] - sequence_ * capacity_;
      const bool is_mine = slots[i] >= 0 && position >= 0 && position < capacity_;
      int total;
      const int place = num_rows_ + block_rank(is_mine, sh_.counts, &total);
      if (is_mine) sh_.rows[place] = row << 16 | position;
      num_rows_ += total;
      if constexpr (kDrift) {
        first_old_ += __syncthreads_count(is_mine && row < begin_);
        num_tracked_ += __syncthreads_count(is_mine && row >= begin_ && row < end_tracked_);
      }
      if (slots[i] < 0 && sequence_ == 0 && row % num_ranks_ == rank_) clear_row(row);
    }
    __syncthreads();
  }

  __device__ void clear_row(int row) const {
    for (int i = 0; i < group_; ++i) {
      const int64_t item = int64_t{row} * num_heads_ + kv_head_ * group_ + i;
      p_.lse[item] = 0.0f;
      auto* out = reinterpret_cast<uint4*>(static_cast<bf16*>(p_.out) + item * D);
      for (int d = 0; d < kVectors; ++d) out[d] = make_uint4(0, 0, 0, 0);
    }
  }

  // The row and the head of a lane, counted from the first of the sequence or its tracked rows.
  __device__ int entry(int lane, bool is_old) const {
    return sh_.rows[(is_old ? first_old_ : 0) + lane / group_];
  }
  __device__ int head(int lane) const { return kv_head_ * group_ + lane % group_; }
  __device__ int64_t item(int lane) const {
    return int64_t{entry(lane, false) >> 16} * num_heads_ + head(lane);
  }
  __device__ int num_lanes(int tile, bool is_old) const {
    return min((is_old ? num_tracked_ : num_rows_) * group_ - tile * kLanes, kLanes);
  }

  // Queries of a tile's lanes, in one group of copies, and what their probabilities are for.
  __device__ void copy_queries(int tile, bool is_old) const {
    const int first = tile * kLanes, count = num_lanes(tile, is_old);
    auto& to = is_old ? sh_.old_queries : sh_.tile.queries;
    const auto* queries = static_cast<const bf16*>(is_old ? p_.q_old : p_.q_cache);
    const int num_vectors = (count + 15) / 16 * 16 * kVectors;
#pragma unroll 4
    for (int at = thread_; at < num_vectors; at += kThreads) {
      const int m = at / kVectors, column = at % kVectors * 8;
      const bool is_valid = m < count;
      const int lane = first + (is_valid ? m : 0), x = entry(lane, is_old);
      const int64_t row = is_old ? x >> 16 : int64_t{sequence_} * capacity_ + (x & 0xffff);
      copy_async(&to[m][column], queries + (row * num_heads_ + head(lane)) * D + column, is_valid);
    }
    commit_copies();
    if constexpr (kDrift) {
      if (thread_ < kLanes) {
        sh_.place[thread_] = thread_ < count ? place(first + thread_, is_old) : kNothing;
      }
    }
  }

  __device__ int place(int lane, bool is_old) const {
    const int row = entry(lane, is_old) >> 16;
    if (row >= begin_ && row < end_tracked_) {
      return (first_tracked_ + row - begin_) * num_heads_ + head(lane);
    }
    return row >= window_ && row < end_window_ ? kMass : kNothing;
  }

  // ---- Tiles ----

  __device__ void attend(int tile, bool is_last, float (&mass)[kWarpKeys / 8][2]) {
    const int count = num_lanes(tile, false);
    Scores x;
    Maxima top;
    score(sh_, sh_.tile.queries, count_, count, x);
    exponentiate(sh_, p_.scale * kLog2E, count_, count, x, top);
    __syncthreads();  // the keys are free, too
    if (kDrift && is_last) put_back_keys();
    commit_copies();
    join(count);
    if (rank_ == 0 && thread_ < count) {
      const float lse = sh_.lse[thread_];
      p_.lse[item(tile * kLanes + thread_)] = lse == INFINITY ? -INFINITY : lse * kLn2;
    }
    weigh(count, x, top, mass);
    wait_copies<1>();  // all but what was put back
    __syncthreads();
    Output<D, W> out = {};
    add_values(sh_, count_, count, out);
    __syncthreads();  // queries, weights and values are free
    if (kDrift && is_last) copy_queries(0, true);
    keep_partial(sh_, count, out);
    cluster_arrive();
    cluster_wait();
    add_partials(tile, count);
  }

  // Tracked rows as they were. The next tile's queries are copied when this one's have been read.
  __device__ void attend_old(int tile, bool has_next) {
    const int count = num_lanes(tile, true);
    Scores x;
    Maxima top;
    score(sh_, sh_.old_queries, count_, count, x);
    exponentiate(sh_, p_.scale * kLog2E, count_, count, x, top);
    __syncthreads();
    join(count);
#pragma unroll
    for (int m = 0; m < kTileGroups; ++m) {
      if (m * 16 >= count) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = tile_lane(m, half), place = sh_.place[row];
        const float scale = exp2_approximate(top[m][half] - sh_.lse[row]);
#pragma unroll
        for (int n = 0; n < kWarpKeys / 8; ++n) {
          write_pair(w_.old, place, n, x[m][n][half * 2] * scale, x[m][n][half * 2 + 1] * scale);
        }
      }
    }
    if (!has_next) return;
    __syncthreads();  // places have been read
    copy_queries(tile + 1, true);
  }

  __device__ void put_back_keys() const {
    const auto* from = static_cast<const bf16*>(p_.k_old) + kv_head_ * D;
    for (int at = thread_; at < num_rows_ * kVectors; at += kThreads) {
      const int row = sh_.rows[at / kVectors] >> 16, column = at % kVectors * 8;
      const int key = (sh_.rows[at / kVectors] & 0xffff) - position_;
      if (key < 0 || key >= count_ || row < begin_ || row >= end_) continue;
      copy_async(&sh_.keys[key][column], from + row * p_.num_kv_heads * D + column, true);
    }
  }

  // Maxima and sums of the warps -> of the cluster's blocks -> log-sum-exp of every lane. Begins
  // after a barrier, contains that of the cluster and ends with one.
  __device__ void join(int count) const {
    const int m = thread_ % kLanes;
    if (m < count) {
      const float2 mine = join_pairs(&sh_.warp_softmax[0][m], kLanes, W);
      for (int rank = thread_ / kLanes; rank < num_ranks_; rank += kThreads / kLanes) {
        store_in(rank, &sh_.softmax[rank_][m], mine);
      }
    }
    cluster_arrive();
    cluster_wait();
    if (thread_ < count) {
      const float2 all = join_pairs(&sh_.softmax[0][thread_], kLanes, num_ranks_);
      // A sum that is NaN has to show, whatever the maximum is.
      const bool is_empty = all.x == -INFINITY && all.y == 0.0f;
      sh_.lse[thread_] = is_empty ? INFINITY : all.x + log2f(all.y);
    }
    __syncthreads();
  }

  // Probabilities: to shared memory as bf16, window rows' to the masses, tracked rows' to memory.
  __device__ void weigh(int count, const Scores& x, const Maxima& top,
                        float (&mass)[kWarpKeys / 8][2]) const {
#pragma unroll
    for (int m = 0; m < kTileGroups; ++m) {
      if (m * 16 >= count) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = tile_lane(m, half);
        const float scale = exp2_approximate(top[m][half] - sh_.lse[row]);
        const int place = kDrift ? sh_.place[row] : kNothing;
#pragma unroll
        for (int n = 0; n < kWarpKeys / 8; ++n) {
          const float a = __fmul_rn(x[m][n][half * 2], scale);
          const float b = __fmul_rn(x[m][n][half * 2 + 1], scale);
          *reinterpret_cast<__nv_bfloat162*>(&sh_.tile.weights[row][pair(n)]) =
              __floats2bfloat162_rn(a, b);
          if constexpr (kDrift) {
            if (place == kMass) mass[n][0] += a, mass[n][1] += b;
            write_pair(w_.recent, place, n, a, b);
          }
        }
      }
    }
  }

  // Probabilities of two keys, if they are a tracked row's. One behind the last key is zero, and
  // there is room for it.
  __device__ void write_pair(float* array, int place, int n, float a, float b) const {
    if (place < 0 || pair(n) >= count_) return;
    auto* to = reinterpret_cast<float2*>(array + int64_t{place} * w_.stride + index_ + pair(n));
    *to = make_float2(a, b);
  }

  __device__ void write_mass(const float (&mass)[kWarpKeys / 8][2]) const {
    float* to = w_.mass + (int64_t{kv_head_} * p_.num_sequences + sequence_) * w_.stride + index_;
#pragma unroll
    for (int n = 0; n < kWarpKeys / 8; ++n) {
      float2 total = make_float2(mass[n][0], mass[n][1]);
#pragma unroll
      for (int offset = 4; offset < kWarpSize; offset *= 2) {
        total.x += __shfl_xor_sync(kFullWarp, total.x, offset);
        total.y += __shfl_xor_sync(kFullWarp, total.y, offset);
      }
      if (lane_index() < 4 && pair(n) < count_) *reinterpret_cast<float2*>(to + pair(n)) = total;
    }
  }

  // ---- The output ----

  // Every so many-th lane is this block's to add up, from all blocks in their order.
  __device__ void add_partials(int tile, int count) const {
    constexpr int kQuads = D / 4, kTogether = 8;  // blocks read at once; their number divides
    for (int at = thread_;; at += kThreads) {
      const int m = rank_ + at / kQuads * num_ranks_, quad = at % kQuads;
      if (m >= count) break;
      float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      for (int first = 0; first < num_ranks_; first += kTogether) {
        float4 x[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) x[i] = load_from(first + i, &sh_.partial[m][quad * 4]);
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          sum.x += x[i].x, sum.y += x[i].y, sum.z += x[i].z, sum.w += x[i].w;
        }
      }
      auto* to = static_cast<bf16*>(p_.out) + item(tile * kLanes + m) * D + quad * 4;
      *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(sum.x, sum.y);
      *reinterpret_cast<__nv_bfloat162*>(to + 2) = __floats2bfloat162_rn(sum.z, sum.w);
    }
  }

  const DriftAttentionParams& p_;
  const Workspace& w_;
  Mine& sh_;
  int thread_, rank_, num_ranks_, kv_head_, sequence_, group_, num_heads_, capacity_;
  int position_, index_, count_;  // of the block's keys: the first, that from the range's, how many
  int num_rows_, num_tracked_, first_old_;  // in sh_.rows: all, the tracked ones, where those begin
  int begin_, end_tracked_, window_, end_window_, end_, first_tracked_;  // see drift::Sequence
};

}  // namespace elastic_cache::cuda::cluster
