// The part kernel of attention with a warpgroup's products (compute capability 9.0); D is head_dim.
//
// A warpgroup takes 64 lanes, a warp of it 16, from the scores to the output; weights stay in
// registers. The warpgroups of a block share the tiles of 64 keys that one more warp copies; as
// many as fit are on their way at once. The scores of the next tile and the output of the one
// before are multiplied while a tile's weights are computed.
// Keys that are not split need no combining: then this kernel writes what that one would.
// A block takes lanes of one sequence.
// The subtle thing: nothing a lane's result goes through depends on which lanes, or how many, are
// beside it.
#pragma once

#include <cmath>

#include "attention_parts.cuh"
#include "attention_state.cuh"
#include "common/hopper.cuh"
#include "common/mma.cuh"
#include "common/reduce.cuh"
#include "common/wgmma.cuh"

namespace elastic_cache::cuda::attention {

constexpr int kGroupLanes = 64;
constexpr int kGroupThreads = 128;

// The form of a block, for lanes of one sequence or of several: its warpgroups share its tiles. A
// block waits for memory most of the time, so of the many that several sequences need it is better
// to have two small ones to a multiprocessor.
template <bool kOfOne_>
struct Blocks {
  static constexpr bool kOfOne = kOfOne_;
  static constexpr int kGroups = kOfOne ? 2 : 1;
  static constexpr int kLanes = kGroups * kGroupLanes;
  static constexpr int kPerSm = 2 / kGroups;
  static constexpr int kStages = 2 + kGroups;
  static constexpr int kCopyThread = kGroups * kGroupThreads;  // the 127 after it do nothing
  static constexpr int kThreads = kCopyThread + kGroupThreads;
  static constexpr int kRegisters = kPerSm == 1 ? 240 : 232;  // of a thread that multiplies
};

template <int D>
using Operand = wgmma::Rows<64, D>;

template <int D, class B>
struct WgmmaShared {
  Operand<D> keys[B::kStages];
  Operand<D> values[B::kStages];
  Operand<D> queries[B::kGroups];
  uint64_t has_keys[B::kStages];  // barriers: copied
  uint64_t has_values[B::kStages];
  uint64_t is_free[B::kStages];  // and read
};
template <int D, class B>
inline constexpr size_t kWgmmaBytes = sizeof(WgmmaShared<D, B>);

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Which tile of all that a block runs over; it lies in slot `index % kStages`.
template <int kStages>
struct TilePlace {
  int index = 0;
  __device__ int slot() const { return index % kStages; }
  __device__ int parity() const { return index / kStages % 2; }
};

// One block; `copy_tiles` is the copying warp's part, `run` a warpgroup's.
template <int D, class B>
class WgmmaPart {
 public:
  __device__ WgmmaPart(const WindowAttentionParams& p, const Parts& parts, unsigned char* memory)
      : p_(p),
        parts_(parts),
        sh_(*reinterpret_cast<Shared*>(memory)),
        lanes_(p, static_cast<int>(blockIdx.x)) {}

  // By one thread.
  __device__ void init_barriers() const {
    for (int i = 0; i < B::kStages; ++i) {
      init_barrier(shared_address(&sh_.has_keys[i]), 1);
      init_barrier(shared_address(&sh_.has_values[i]), 1);
      init_barrier(shared_address(&sh_.is_free[i]), num_groups() * kGroupThreads / kWarpSize);
    }
    publish_barriers();
  }

  // Warpgroups that have lanes.
  __device__ int num_groups() const {
    const int first = static_cast<int>(blockIdx.z) * B::kLanes;
    return lanes_.num_lanes() - first > kGroupLanes ? B::kGroups : 1;
  }

  __device__ void copy_tiles(const CUtensorMap* key_map, const CUtensorMap* value_map) const {
    const Piece piece = find_piece();
    if (thread() == 0) copy_span(piece.sequence, span_of(piece), key_map, value_map);
  }

  __device__ void run() {
    const Piece piece = find_piece();
    if (piece.first >= piece.end) return;
    const int64_t query = query_of(piece);
    const unsigned int has_query = __ballot_sync(kFullWarp, query >= 0);
    const bool is_mine[2] = {(has_query >> (thread() / 4) & 1) != 0,
                             (has_query >> (thread() / 4 + 8) & 1) != 0};
    copy_queries(query);
    wait_copies<0>();
    __syncwarp();
    Queries queries;
    load_queries(queries);
    LaneState<D> state;
    add_span(state, span_of(piece), queries);
    write(state, piece, is_mine);
    if (is_whole()) write_skipped(piece, is_mine);
  }

 private:
  using Shared = WgmmaShared<D, B>;
  using Place = TilePlace<B::kStages>;
  using Scores = float[kTileKeys / 8][4];
  using Weights = uint32_t[kTileKeys / 16][4];
  using Queries = uint32_t[D / 16][4];

  // Lanes first .. end - 1 of a sequence, whose rows begin at `row`; none where `end` is 0.
  struct Piece {
    int sequence;
    int row;
    int first;
    int end;
    KeySpan keys;  // all that the lanes want
  };
  // Where the rows of a sequence lie. Those of the last one are taken to go on to the end of the
  // list; they are skipped there and want no keys.
  struct Run {
    int row;
    int num_lanes;
    int num_with_keys;
    KeySpan keys;
  };

  __device__ Run run_of(int sequence) const {
    const int32_t* segment = p_.segments + sequence * kSegmentColumns;
    const int row = segment[kSegmentBegin], most = max(lanes_.num_rows - row, 0);
    int count = 0;
#pragma unroll
    for (int column = kSegmentTracked; column < kSegmentColumns; ++column) count += segment[column];
    count = min(count, most);
    const bool is_last = sequence == static_cast<int>(p_.num_sequences) - 1;
    return {row, (is_last ? most : count) * lanes_.group, count * lanes_.group,
            keys_of(p_.key_range, sequence)};
  }

  // The block's: number blockIdx.z of the pieces of kLanes into which the lanes of every sequence
  // are cut. Every warp finds it for itself, a thread looking at a sequence.
  __device__ Piece find_piece() const {
    const auto index = static_cast<int>(blockIdx.z);
    if constexpr (B::kOfOne) {
      const int first = index * B::kLanes;
      return {0, 0, first, min(first + B::kLanes, lanes_.num_lanes()), keys_of(p_.key_range, 0)};
    }
    const auto of = [](int value, int which) { return __shfl_sync(kFullWarp, value, which); };
    const auto num_sequences = static_cast<int>(p_.num_sequences);
    int num_before = 0;
    for (int base = 0; base < num_sequences; base += kWarpSize) {
      const Run mine = run_of(min(base + thread(), num_sequences - 1));
      const int num_pieces =
          base + thread() < num_sequences ? (mine.num_lanes + B::kLanes - 1) / B::kLanes : 0;
      const int num_through = num_before + sum_through(num_pieces);
      const unsigned int behind = __ballot_sync(kFullWarp, num_through > index);
      if (behind != 0) {
        const int owner = __ffs(static_cast<int>(behind)) - 1;
        const int first = (index - of(num_through - num_pieces, owner)) * B::kLanes;
        const KeySpan keys{of(mine.keys.begin, owner), of(mine.keys.end, owner)};
        const bool has_keys = first < of(mine.num_with_keys, owner);
        return {base + owner, of(mine.row, owner), first,
                min(first + B::kLanes, of(mine.num_lanes, owner)), has_keys ? keys : KeySpan{0, 0}};
      }
      num_before = of(num_through, kWarpSize - 1);
    }
    return {};
  }
  __device__ KeySpan span_of(const Piece& piece) const {
    return split_keys(piece.keys, static_cast<int>(blockIdx.y), parts_.num_splits);
  }
  __device__ static int thread() { return static_cast<int>(threadIdx.x % kWarpSize); }
  __device__ static int group() { return static_cast<int>(threadIdx.x / kGroupThreads); }
  // The warp's first lane of the 64 of its group.
  __device__ static int warp_lane() {
    return static_cast<int>(threadIdx.x % kGroupThreads / kWarpSize * 16);
  }
  // Of the sequence's lanes, the one of a row of this thread's C fragments.
  __device__ static int lane(const Piece& piece, int half) {
    return piece.first + group() * kGroupLanes + warp_lane() + half * 8 + thread() / 4;
  }
  __device__ int64_t item(const Piece& piece, int half) const {
    return int64_t{piece.row} * lanes_.num_heads + lanes_.item(lane(piece, half));
  }
  __device__ static void sync(int barrier, int num_threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
  }

  __device__ static int num_tiles(const KeySpan& span) {
    return (max(span.end - span.begin, 0) + kTileKeys - 1) / kTileKeys;
  }

  // By one thread.
  __device__ void copy_span(int sequence, const KeySpan& span, const CUtensorMap* key_map,
                            const CUtensorMap* value_map) const {
    const uint64_t policy = evict_first_policy();
    const int block = static_cast<int>(blockIdx.x) * (D / wgmma::kBlockColumns);
    int slot = sequence * static_cast<int>(p_.capacity) + span.begin;
    Place at;
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

  // Of the warp's 16 lanes number thread() % 16: which of all queries it has; -1: the piece has no
  // such lane, or its row is skipped. (LaneMap's head() is a second division, which the compiler
  // puts behind the load.)
  __device__ int64_t query_of(const Piece& piece) const {
    const int lane = piece.first + group() * kGroupLanes + warp_lane() + thread() % 16;
    const int row = lanes_.row(lane), head = lanes_.first_head + lane - row * lanes_.group;
    const int slot = lane < piece.end ? p_.rows[piece.row + row] : -1;
    return slot < 0 ? -1 : int64_t{slot} * lanes_.num_heads + head;
  }
  // The warp's own: no other reads them. Where there is none, anything may lie: no lane's result
  // depends on another's query.
  __device__ void copy_queries(int64_t query) const {
    constexpr int kRowVectors = D / 8, kStep = kWarpSize / kRowVectors;
    const int column = thread() % kRowVectors * 8;
    const auto* from = static_cast<const __nv_bfloat16*>(p_.q_cache) + column;
#pragma unroll
    for (int i = 0; i < 16; i += kStep) {
      const int m = i + thread() / kRowVectors;
      const int64_t at = __shfl_sync(kFullWarp, query, m);
      copy_async_if(at >= 0, sh_.queries[group()].at(warp_lane() + m, column), from + at * D);
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

  __device__ __forceinline__ void add_span(LaneState<D>& state, const KeySpan& span,
                                           Queries& queries) const {
    state.clear();
    Place at;
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
    }
  }

  __device__ __forceinline__ void first_weights(LaneState<D>& state, Queries& queries,
                                                Weights& weights, Place at, int count) const {
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
                                           Place at, int count) const {
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
  __device__ __forceinline__ void multiply_keys(Scores& score, Queries& queries, Place at) const {
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
                                                  Place at) const {
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
  __device__ __forceinline__ void wait_values(Place at, int count) const {
    wait_barrier(shared_address(&sh_.has_values[at.slot()]), at.parity());
    if (count >= kTileKeys) return;
    const int num_threads = num_groups() * kGroupThreads;
    Operand<D>& values = sh_.values[at.slot()];
    for (int i = count * (D / 8) + static_cast<int>(threadIdx.x); i < kTileKeys * (D / 8);
         i += num_threads) {
      *reinterpret_cast<uint4*>(values.at(i / (D / 8), i % (D / 8) * 8)) = make_uint4(0, 0, 0, 0);
    }
    wgmma::publish_operands();
    sync(1 + B::kGroups, num_threads);
  }

  // This warp has read a tile.
  __device__ __forceinline__ void release(Place at) const {
    if (thread() == 0) arrive(shared_address(&sh_.is_free[at.slot()]));
  }

  // Whether the block sees all keys.
  __device__ bool is_whole() const { return parts_.num_splits == 1; }

  // Of 16 columns, where the four begin that a thread stores.
  __device__ static int store_column() {
    return thread() % 2 != 0 ? 8 + (thread() % 4 - 1) * 2 : thread() % 4 * 2;
  }

  __device__ void write_whole(int64_t at, const float4& x) const {
    uint2 four = make_uint2(packed(x.x, x.y), packed(x.z, x.w));
    *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(p_.out) + at) = four;
  }

  // Lanes of rows that are skipped.
  __device__ void write_skipped(const Piece& piece, const bool (&is_mine)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (is_mine[half] || lane(piece, half) >= piece.end) continue;
      const int64_t at = item(piece, half);
      if (thread() % 4 == 0) p_.lse[at] = 0.0f;
#pragma unroll
      for (int n = 0; n < D / 8; n += 2) {
        write_whole(at * D + store_column() + n * 8, make_float4(0, 0, 0, 0));
      }
    }
  }

  // Neighbouring threads exchange halves of two groups of columns: a thread stores four floats.
  // is_mine: whether this thread has the lane, and its row is not skipped.
  __device__ __forceinline__ void write(LaneState<D>& state, const Piece& piece,
                                        const bool (&is_mine)[2]) const {
    const int64_t first_item = blockIdx.y * p_.num_rows * p_.num_heads;
    const bool is_odd = thread() % 2 != 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = state.sum[half];
      sum += __shfl_xor_sync(kFullWarp, sum, 1);
      sum += __shfl_xor_sync(kFullWarp, sum, 2);
      const int64_t at = first_item + item(piece, half);
      if (is_mine[half] && thread() % 4 == 0) {
        if (is_whole()) {
          p_.lse[at] = log_sum(state.max[half], sum);
        } else {
          parts_.softmax[at] = make_float2(state.max[half], sum);
        }
      }
      const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
      const int64_t to = at * D + store_column();
#pragma unroll
      for (int n = 0; n < D / 8; n += 2) {
        const float* left = &state.out[n][half * 2];
        const float* right = &state.out[n + 1][half * 2];
        const float a = __shfl_xor_sync(kFullWarp, is_odd ? left[0] : right[0], 1);
        const float b = __shfl_xor_sync(kFullWarp, is_odd ? left[1] : right[1], 1);
        const float4 four =
            is_odd ? make_float4(a, b, right[0], right[1]) : make_float4(left[0], left[1], a, b);
        if (!is_mine[half]) continue;
        if (is_whole()) {
          write_whole(to + n * 8, make_float4(four.x * inverse, four.y * inverse, four.z * inverse,
                                              four.w * inverse));
        } else {
          *reinterpret_cast<float4*>(parts_.out + to + n * 8) = four;
        }
      }
    }
  }

  const WindowAttentionParams& p_;
  const Parts& parts_;
  Shared& sh_;
  LaneMap lanes_;
};
#endif

template <int D, class B>
__global__ void __launch_bounds__(B::kThreads, B::kPerSm)
    attention_wgmma_kernel(const __grid_constant__ CUtensorMap key_map,
                           const __grid_constant__ CUtensorMap value_map,
                           const WindowAttentionParams p, const Parts parts) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  // Swizzled tiles are aligned to it.
  extern __shared__ __align__(1024) unsigned char wgmma_memory[];
  WgmmaPart<D, B> part(p, parts, wgmma_memory);
  if (parts.num_splits == 1) let_next_start();  // a product, as behind the combining kernel
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == B::kCopyThread) {
    prefetch_map(&key_map);
    prefetch_map(&value_map);
    part.init_barriers();
  }
  __syncthreads();
  wait_for_previous();
  if (thread >= B::kCopyThread) {
    wgmma::give_registers<24>();
    if (thread < B::kCopyThread + kWarpSize) part.copy_tiles(&key_map, &value_map);
  } else if (thread / kGroupThreads < part.num_groups()) {
    wgmma::take_registers<B::kRegisters>();
    part.run();
  }
#endif
}

}  // namespace elastic_cache::cuda::attention
