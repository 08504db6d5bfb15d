// The part kernel of attention with a warpgroup's products (compute capability 9.0); D is head_dim.
//
// A warpgroup takes 64 lanes, a warp of it 16, from the scores to the output; weights stay in
// registers. The two warpgroups of a block share the tiles of 64 keys that one more warp copies;
// as many as fit are on their way at once. The scores of the next tile and the output of the one
// before are multiplied while a tile's weights are computed.
// The subtle thing: nothing a lane's result goes through depends on which lanes, or how many, are
// beside it. Rows of several sequences in a block: it runs over the keys of each, every warpgroup
// computing where a lane of its own is concerned.
#pragma once

#include <cmath>

#include "attention_parts.cuh"
#include "common/hopper.cuh"
#include "common/mma.cuh"
#include "common/reduce.cuh"
#include "common/wgmma.cuh"

namespace elastic_cache::cuda::attention {

constexpr int kGroupLanes = 64;
constexpr int kGroupThreads = 128;
constexpr int kGroups = 2;
constexpr int kBlockLanes = kGroups * kGroupLanes;
constexpr int kCopyThread =
    kGroups * kGroupThreads;  // it copies tiles; the 127 after it do nothing
constexpr int kBlockThreads = kCopyThread + kGroupThreads;
constexpr int kStages = 4;

template <int D>
using Operand = wgmma::Rows<64, D>;

template <int D>
struct WgmmaShared {
  Operand<D> keys[kStages];
  Operand<D> values[kStages];
  Operand<D> queries[kGroups];
  uint64_t has_keys[kStages];  // barriers: copied
  uint64_t has_values[kStages];
  uint64_t is_free[kStages];  // and read
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

// Which tile of all that a block runs over; it lies in slot `index % kStages`.
struct TilePlace {
  int index = 0;
  __device__ int slot() const { return index % kStages; }
  __device__ int parity() const { return index / kStages % 2; }
};

// One block; `copy_tiles` is the copying warp's part, `run` a warpgroup's.
template <int D>
class WgmmaPart {
 public:
  __device__ WgmmaPart(const WindowAttentionParams& p, const Parts& parts, unsigned char* memory)
      : p_(p),
        parts_(parts),
        sh_(*reinterpret_cast<WgmmaShared<D>*>(memory +
                                               (1024 - shared_address(memory) % 1024) % 1024)),
        lanes_(p, static_cast<int>(blockIdx.z)),
        first_lane_(static_cast<int>(blockIdx.x) * kBlockLanes) {}

  // By one thread.
  __device__ void init_barriers() const {
    for (int i = 0; i < kStages; ++i) {
      init_barrier(shared_address(&sh_.has_keys[i]), 1);
      init_barrier(shared_address(&sh_.has_values[i]), 1);
      init_barrier(shared_address(&sh_.is_free[i]), num_groups() * kGroupThreads / kWarpSize);
    }
    publish_barriers();
  }

  // Warpgroups that have lanes.
  __device__ int num_groups() const {
    return lanes_.num_rows * lanes_.group - first_lane_ > kGroupLanes ? kGroups : 1;
  }

  __device__ void copy_tiles(const CUtensorMap* key_map, const CUtensorMap* value_map) const {
    // Asked for before anything is known of the rows: most calls are of one sequence, the first.
    const KeySpan first = span_of(0);
    const Sequences all = sequences();
    TilePlace at;
    for (int s = all.next(-1); s != kNoSequence; s = all.next(s)) {
      const KeySpan span = s == 0 ? first : span_of(s);
      if (thread() == 0) copy_sequence(s, span, at, key_map, value_map);
      at.index += num_tiles(span);
    }
  }

  __device__ void run() {
    copy_queries();
    const Sequences all = sequences();
    const int sequence[2] = {lanes_.sequence(p_, lane(0)), lanes_.sequence(p_, lane(1))};
    wait_copies<0>();
    sync(1 + group(), kGroupThreads);
    Queries queries;
    load_queries(queries);
    TilePlace at;
    for (int s = all.next(-1); s != kNoSequence; s = all.next(s)) {
      if (all.are_in_group(s)) {
        run_sequence(span_of(s), queries, at, {sequence[0] == s, sequence[1] == s});
      } else {
        skip_sequence(span_of(s), at);
      }
    }
  }

 private:
  using Scores = float[kTileKeys / 8][4];
  using Weights = uint32_t[kTileKeys / 16][4];
  using Queries = uint32_t[D / 16][4];

  // Thread i of a warp: sequences of the block's lanes i, i + 32, ...
  struct Sequences {
    int of[kBlockLanes / kWarpSize];

    // The smallest above `after`.
    __device__ int next(int after) const {
      int best = kNoSequence;
#pragma unroll
      for (int i = 0; i < kBlockLanes / kWarpSize; ++i) {
        if (of[i] > after) best = min(best, of[i]);
      }
      return __reduce_min_sync(kFullWarp, best);
    }
    // Whether a lane of this warpgroup is of that sequence.
    __device__ bool are_in_group(int sequence) const {
      bool is_one = false;
#pragma unroll
      for (int i = 0; i < kBlockLanes / kWarpSize; ++i) {
        is_one |= of[i] == sequence && i / (kGroupLanes / kWarpSize) == group();
      }
      return __any_sync(kFullWarp, is_one);
    }
  };
  __device__ Sequences sequences() const {
    Sequences all;
#pragma unroll
    for (int i = 0; i < kBlockLanes / kWarpSize; ++i) {
      all.of[i] = lanes_.sequence(p_, first_lane_ + i * kWarpSize + thread());
    }
    return all;
  }

  __device__ static int thread() { return static_cast<int>(threadIdx.x) % kWarpSize; }
  __device__ static int group() { return static_cast<int>(threadIdx.x) / kGroupThreads; }
  // The warp's first lane of the 64 of its group.
  __device__ static int warp_lane() {
    return static_cast<int>(threadIdx.x) % kGroupThreads / kWarpSize * 16;
  }
  // Of the call's lanes, the one of a row of this thread's C fragments.
  __device__ int lane(int half) const {
    return first_lane_ + group() * kGroupLanes + warp_lane() + half * 8 + thread() / 4;
  }
  __device__ static void sync(int barrier, int num_threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
  }

  __device__ KeySpan span_of(int sequence) const {
    return split_keys(p_.key_range, sequence, static_cast<int>(blockIdx.y), parts_.num_splits);
  }
  __device__ static int num_tiles(const KeySpan& span) {
    return (max(span.end - span.begin, 0) + kTileKeys - 1) / kTileKeys;
  }

  // One thread copies the tiles of a sequence.
  __device__ void copy_sequence(int sequence, const KeySpan& span, TilePlace at,
                                const CUtensorMap* key_map, const CUtensorMap* value_map) const {
    const uint64_t policy = evict_first_policy();
    const int block = static_cast<int>(blockIdx.z) * (D / wgmma::kBlockColumns);
    int slot = sequence * static_cast<int>(p_.capacity) + span.begin;
    for (int tile = num_tiles(span); tile > 0; --tile, ++at.index, slot += kTileKeys) {
      const int i = at.slot();
      wait_barrier(shared_address(&sh_.is_free[i]), at.parity() ^ 1);
      const uint32_t has_keys = shared_address(&sh_.has_keys[i]);
      const uint32_t has_values = shared_address(&sh_.has_values[i]);
      expect_bytes(has_keys, sizeof(Operand<D>));
      copy_box(shared_address(&sh_.keys[i]), key_map, has_keys, 0, slot, block, policy);
      expect_bytes(has_values, sizeof(Operand<D>));
      copy_box(shared_address(&sh_.values[i]), value_map, has_values, 0, slot, block, policy);
    }
  }

  __device__ void copy_queries() const {
    const auto* queries = static_cast<const __nv_bfloat16*>(p_.q_cache);
    const int first = first_lane_ + group() * kGroupLanes;
#pragma unroll
    for (int i = 0; i < kGroupLanes * (D / 8) / kGroupThreads; ++i) {
      const int at = static_cast<int>(threadIdx.x) % kGroupThreads + i * kGroupThreads;
      const int m = at / (D / 8), column = at % (D / 8) * 8;
      const int slot = lanes_.slot(p_, first + m);
      const int64_t from =
          slot < 0 ? 0 : (int64_t{slot} * lanes_.num_heads + lanes_.head(first + m)) * D;
      copy_async(sh_.queries[group()].at(m, column), queries + from + column, slot >= 0);
    }
    commit_copies();
  }
  __device__ __forceinline__ void load_queries(Queries& queries) const {
#pragma unroll
    for (int d = 0; d < D; d += 16) {
      load_matrices(queries[d / 16], reinterpret_cast<const __nv_bfloat16*>(sh_.queries[group()].at(
                                         warp_lane() + a_row(), d + a_column())));
    }
  }

  // Tiles that no lane of this group wants.
  __device__ void skip_sequence(const KeySpan& span, TilePlace& at) const {
    for (int count = span.end - span.begin; count > 0; count -= kTileKeys, ++at.index) {
      wait_values(at, count);
      release(at);
    }
  }

  // is_mine: whether this thread's lanes are of that sequence.
  __device__ __forceinline__ void run_sequence(const KeySpan& span, Queries& queries, TilePlace& at,
                                               const bool (&is_mine)[2]) const {
    LaneState<D> state;
    state.clear();
    int count = span.end - span.begin;  // of the keys not yet added
    if (count > 0) {
      Weights weights;
      first_weights(state, queries, weights, at, count);
      for (; count > kTileKeys; count -= kTileKeys, ++at.index) {
        add_tile(state, queries, weights, at, count - kTileKeys);
      }
      wait_values(at, count);
      multiply_values(state.out, weights, at);
      wgmma::wait<0>();
      wgmma::hold(state.out);
      release(at);
      ++at.index;
    }
    write(state, is_mine);
  }

  __device__ __forceinline__ void first_weights(LaneState<D>& state, Queries& queries,
                                                Weights& weights, TilePlace at, int count) const {
    Scores score;
    float rescale[2];
    multiply_keys(score, queries, at);
    wgmma::wait<0>();
    wgmma::hold(score);
    state.weigh(score, p_.scale * kLog2E, count, rescale);
    pack(score, weights);
  }

  // Adds the output of a tile, none of whose keys is missing, and replaces its weights by those of
  // the tile after, of which `count` keys are there.
  __device__ __forceinline__ void add_tile(LaneState<D>& state, Queries& queries, Weights& weights,
                                           TilePlace at, int count) const {
    Scores score;
    float rescale[2];
    multiply_keys(score, queries, {at.index + 1});
    wait_values(at, kTileKeys);
    multiply_values(state.out, weights, at);
    wgmma::wait<1>();
    wgmma::hold(score);
    state.weigh(score, p_.scale * kLog2E, count, rescale);
    wgmma::wait<0>();
    wgmma::hold(state.out);
    wgmma::hold(weights);
    release(at);
    state.scale(rescale);
    pack(score, weights);
  }

  __device__ static __forceinline__ void pack(const Scores& score, Weights& weights) {
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        weights[n / 2][n % 2 * 2 + half] = packed(score[n][half * 2], score[n][half * 2 + 1]);
      }
    }
  }

  // Begins score = queries keys^T of a tile.
  __device__ __forceinline__ void multiply_keys(Scores& score, Queries& queries,
                                                TilePlace at) const {
    constexpr int kBlockBytes = Operand<D>::kBlockBytes;
    wait_barrier(shared_address(&sh_.has_keys[at.slot()]), at.parity());
    const uint32_t keys = shared_address(&sh_.keys[at.slot()]);
#pragma unroll
    for (int n = 0; n < kTileKeys / 8; ++n) {
      score[n][0] = score[n][1] = score[n][2] = score[n][3] = 0.0f;
    }
    wgmma::begin(score, queries);
#pragma unroll
    for (int d = 0; d < D; d += 16) {
      const uint32_t from =
          keys + d / wgmma::kBlockColumns * kBlockBytes + d % wgmma::kBlockColumns * 2;
      wgmma::multiply_transposed(score, queries[d / 16], wgmma::operand<kBlockBytes>(from));
    }
    wgmma::commit();
  }

  // Begins out += weights values of a tile.
  __device__ __forceinline__ void multiply_values(float (&out)[D / 8][4], Weights& weights,
                                                  TilePlace at) const {
    const uint32_t values = shared_address(&sh_.values[at.slot()]);
    wgmma::begin(out, weights);
#pragma unroll
    for (int k = 0; k < kTileKeys; k += 16) {
      const uint32_t from = values + k * wgmma::kBlockRowBytes;
      wgmma::multiply(out, weights[k / 16], wgmma::operand<Operand<D>::kBlockBytes>(from));
    }
    wgmma::commit();
  }

  // Values of a tile of which `count` keys are there. The others become zero: a weight of zero
  // times what lies there must not be NaN.
  __device__ __forceinline__ void wait_values(TilePlace at, int count) const {
    wait_barrier(shared_address(&sh_.has_values[at.slot()]), at.parity());
    if (count >= kTileKeys) return;
    const int num_threads = num_groups() * kGroupThreads;
    Operand<D>& values = sh_.values[at.slot()];
    for (int i = count * (D / 8) + static_cast<int>(threadIdx.x); i < kTileKeys * (D / 8);
         i += num_threads) {
      *reinterpret_cast<uint4*>(values.at(i / (D / 8), i % (D / 8) * 8)) = make_uint4(0, 0, 0, 0);
    }
    wgmma::publish_operands();
    sync(1 + kGroups, num_threads);
  }

  // This warp has read a tile.
  __device__ __forceinline__ void release(TilePlace at) const {
    if (thread() == 0) arrive(shared_address(&sh_.is_free[at.slot()]));
  }

  // Neighbouring threads exchange halves of two groups of columns: a thread stores 16 bytes.
  __device__ __forceinline__ void write(LaneState<D>& state, const bool (&is_mine)[2]) const {
    const int64_t first_item = blockIdx.y * p_.num_rows * p_.num_heads;
    const bool is_odd = thread() % 2 != 0;
    const int column = is_odd ? 8 + (thread() % 4 - 1) * 2 : thread() % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = state.sum[half];
      sum += __shfl_xor_sync(kFullWarp, sum, 1);
      sum += __shfl_xor_sync(kFullWarp, sum, 2);
      const int64_t item = first_item + lanes_.item(lane(half));
      if (is_mine[half] && thread() % 4 == 0) {
        parts_.softmax[item] = make_float2(state.max[half], sum);
      }
      float* to = parts_.out + item * D + column;
#pragma unroll
      for (int n = 0; n < D / 8; n += 2) {
        const float* left = &state.out[n][half * 2];
        const float* right = &state.out[n + 1][half * 2];
        const float a = __shfl_xor_sync(kFullWarp, is_odd ? left[0] : right[0], 1);
        const float b = __shfl_xor_sync(kFullWarp, is_odd ? left[1] : right[1], 1);
        const float4 four =
            is_odd ? make_float4(a, b, right[0], right[1]) : make_float4(left[0], left[1], a, b);
        if (is_mine[half]) *reinterpret_cast<float4*>(to + n * 8) = four;
      }
    }
  }

  const WindowAttentionParams& p_;
  const Parts& parts_;
  WgmmaShared<D>& sh_;
  LaneMap lanes_;
  int first_lane_;
};
#endif

template <int D>
__global__ void __launch_bounds__(kBlockThreads, 1)
    attention_wgmma_kernel(const __grid_constant__ CUtensorMap key_map,
                           const __grid_constant__ CUtensorMap value_map,
                           const WindowAttentionParams p, const Parts parts) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(16) unsigned char memory[];
  WgmmaPart<D> part(p, parts, memory);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == kCopyThread) {
    prefetch_map(&key_map);
    prefetch_map(&value_map);
    part.init_barriers();
  }
  __syncthreads();
  wait_for_previous();
  if (thread >= kCopyThread) {
    wgmma::give_registers<24>();
    if (thread < kCopyThread + kWarpSize) part.copy_tiles(&key_map, &value_map);
  } else if (thread / kGroupThreads < part.num_groups()) {
    wgmma::take_registers<240>();
    part.run();
  }
#endif
}

}  // namespace elastic_cache::cuda::attention
