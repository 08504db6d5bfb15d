// out[M, N] = x[M, K] w[K, N] for few rows: a stream of the weights through shared memory.
//
// The weights do not depend on the kernel before this one, so their copies begin before it has
// ended; only the copies of x wait for it. A block owns a tile of 64 kBlocks columns and one of
// kSplits ranges of k. The splits of a tile are a cluster and add their parts up through
// distributed shared memory, in the order of k: no workspace, no counters.
//
// The gated form's w is [K, 2N], gate, then up, and out is what swiglu makes of x w. Two blocks, a
// cluster, have 192 columns of each: the first the gate of columns 0 .. 127 and up of 0 .. 63, the
// second the gate of 128 .. 191 and up of 64 .. 191. So each has all it needs of 64 columns; of the
// 64 they share each finishes a half, which takes 32 columns of the other's.
//
// A warpgroup multiplies 64 rows (fewer: the rest is whatever lies in shared memory, and is not
// stored) with all columns of the tile.
#pragma once

#include <algorithm>

#include "common/hopper.cuh"
#include "common/launch.h"
#include "common/mma.cuh"
#include "common/wgmma.cuh"
#include "swiglu.cuh"

namespace elastic_cache::cuda::stream {

using bf16 = __nv_bfloat16;
using wgmma::kBlockColumns;

constexpr int kDepth = 64;  // k of a stage; for x these are the 128 bytes
constexpr int kInstructionDepth = 16;
constexpr int kGroupThreads = 128;
constexpr int kMaxRows = 192;
constexpr int kRingBytes = 224 * 1024;      // both rings; the small kernel ahead needs some, too
constexpr int kInputRingBytes = 64 * 1024;  // at most, of these
constexpr int kWindowBytes = 72 * 1024;     // of weights under way

template <int kRows_, int kBlocks_, int kSplits_, bool kIsGated_ = false>
struct Form {
  static constexpr int kRows = kRows_;
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kSplits = kSplits_;
  static constexpr bool kIsGated = kIsGated_;
  static constexpr int kCluster = kIsGated ? 2 : kSplits;
  static constexpr int kColumnGroups = kBlocks * 8;  // of eight columns
  static constexpr int kBlockBytes = kDepth * kBlockColumns * 2;
  static constexpr int kWeightBytes = kBlocks * kBlockBytes;
  static constexpr int kInputBytes = kRows * kDepth * 2;
  static constexpr int kInputStages = std::clamp(kInputRingBytes / kInputBytes, 3, 12);
  static constexpr int kConsumers = (kRows + 63) / 64 * kGroupThreads;  // a group has 64 rows
  static constexpr int kThreads = kConsumers + 64;  // a warp copies weights, a warp copies x
  static constexpr int kPartBytes = kConsumers * kColumnGroups * 16;
  // The tensor cores read 64 rows also where x has fewer: what lies behind must be shared memory.
  static constexpr int kReadBytes = kConsumers / kGroupThreads * 64 * kDepth * 2;
  static constexpr int kInputRing = (kInputStages - 1) * kInputBytes + kReadBytes;
  static constexpr int kStages = (kRingBytes - kInputRing) / kWeightBytes;
  static constexpr int kInputOffset = kStages * kWeightBytes;
  static constexpr int kBarrierOffset = kInputOffset + kInputRing;
  static constexpr int kSharedBytes = kBarrierOffset + (kStages + kInputStages) * 16;
  static_assert(kRows % 16 == 0 && kStages >= 2 && kInputBytes % 1024 == 0);
  static_assert(!kIsGated || (kBlocks == 3 && kSplits == 1));
  static_assert(kPartBytes <= kBarrierOffset && kSharedBytes <= 227 * 1024);
};

struct Problem {
  bf16* out;
  int num_rows;
  int num_columns;  // of out
  int num_steps;    // stages of the whole of k
  int num_tiles;
  int window;  // stages
};

// The rings in shared memory, and what a block has to do.
template <class F>
struct Work {
  uint32_t ring;
  int rank;  // in the cluster; which split of k, or of a gated tile
  int first_tile;
  int tile_stride;
  int first_step;
  int num_steps;

  __device__ Work(const void* shared, const Problem& p) {
    ring = shared_address(shared);
    const int block = static_cast<int>(blockIdx.x);
    rank = block % F::kCluster;
    first_tile = block / F::kCluster;
    tile_stride = static_cast<int>(gridDim.x) / F::kCluster;
    const int split = F::kIsGated ? 0 : rank;
    first_step = p.num_steps * split / F::kSplits;
    num_steps = p.num_steps * (split + 1) / F::kSplits - first_step;
  }

  __device__ int k(int step) const { return (first_step + step) * kDepth; }
  __device__ uint32_t weights(int slot) const { return ring + slot * F::kWeightBytes; }
  __device__ uint32_t inputs(int slot) const {
    return ring + F::kInputOffset + slot * F::kInputBytes;
  }
  // Of a slot of the weights' ring, or of kStages + a slot of x's; the other one is 8 further.
  __device__ uint32_t full(int slot) const { return ring + F::kBarrierOffset + slot * 16; }
  __device__ uint32_t empty(int slot) const { return full(slot) + 8; }
};

// A place in a ring: the slot, and the parity of the round through it.
template <int kSlots>
struct Place {
  int slot = 0;
  int parity = 0;

  __device__ void advance() {
    if (++slot == kSlots) slot = 0, parity ^= 1;
  }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <class F>
__device__ void init_barriers(const Work<F>& work) {
  for (int slot = 0; slot < F::kStages + F::kInputStages; ++slot) {
    init_barrier(work.full(slot), 1);
    init_barrier(work.empty(slot), F::kConsumers / 32);
  }
  publish_barriers();
}

// Starts copying a stage of a tile's columns: neighbours, unless gated.
template <class F>
__device__ inline void copy_columns(const Work<F>& work, const Problem& p, const CUtensorMap* map,
                                    int tile, int step, int slot, uint64_t policy) {
  const uint32_t full = work.full(slot), to = work.weights(slot);
  if constexpr (F::kIsGated) {
    const int gate = tile * F::kBlocks, up = p.num_columns / kBlockColumns + gate;
    const int own = work.rank == 0 ? 0 : F::kBlocks - 1, shared = work.rank == 0 ? gate : up;
    copy_box(to, map, full, 0, work.k(step), gate + own, policy);
    copy_box(to + F::kBlockBytes, map, full, 0, work.k(step), shared + 1, policy);
    copy_box(to + 2 * F::kBlockBytes, map, full, 0, work.k(step), up + own, policy);
  } else {
    copy_box(to, map, full, 0, work.k(step), tile * F::kBlocks, policy);
  }
}

// One thread. Does not wait for the kernel before this one: nothing writes weights. (The parity
// before the first: a wait for it ends at once.) At most p.window stages are under way: with the
// whole ring the queues in front of the memory are long, x waits in them, and some multiprocessors
// get much more than others (one of gate_up's blocks ended 11 us before the last, now 2).
template <class F>
__device__ void copy_weights(const Work<F>& work, const Problem& p, const CUtensorMap* map) {
  const uint64_t policy = evict_first_policy();
  Place<F::kStages> place, landed;
  int under_way = 0;
  for (int tile = work.first_tile; tile < p.num_tiles; tile += work.tile_stride) {
    for (int step = 0; step < work.num_steps; ++step, place.advance()) {
      wait_barrier(work.empty(place.slot), place.parity ^ 1);
      if (under_way == p.window) {
        wait_barrier(work.full(landed.slot), landed.parity);
        landed.advance();
      } else {
        ++under_way;
      }
      expect_bytes(work.full(place.slot), F::kWeightBytes);
      copy_columns(work, p, map, tile, step, place.slot, policy);
    }
  }
}

// One thread, after the kernel before this one has ended.
template <class F>
__device__ void copy_inputs(const Work<F>& work, const Problem& p, const CUtensorMap* map) {
  const uint64_t policy = evict_last_policy();
  Place<F::kInputStages> place;
  for (int tile = work.first_tile; tile < p.num_tiles; tile += work.tile_stride) {
    for (int step = 0; step < work.num_steps; ++step, place.advance()) {
      const int slot = F::kStages + place.slot;
      wait_barrier(work.empty(slot), place.parity ^ 1);
      expect_bytes(work.full(slot), F::kInputBytes);
      copy_box(work.inputs(place.slot), map, work.full(slot), work.k(step), 0, policy);
    }
  }
}

// Begins c (64 rows x the tile's columns) += the stage's product; keep false: c = it.
template <class F>
__device__ inline void multiply_stage(float (&c)[F::kColumnGroups][4], uint32_t inputs,
                                      uint32_t weights, bool keep) {
  wgmma::begin();
#pragma unroll
  for (int k = 0; k < kDepth; k += kInstructionDepth) {
    const uint64_t a = wgmma::operand<0>(inputs + k * 2);
    const uint64_t b = wgmma::operand<F::kBlockBytes>(weights + k * kBlockColumns * 2);
    wgmma::multiply(c, a, b, keep || k > 0);
  }
  wgmma::commit();
}

template <class F>
struct Places {
  Place<F::kStages> weights;
  Place<F::kInputStages> inputs;

  __device__ void advance() {
    weights.advance();
    inputs.advance();
  }
};

// This warp has read a stage.
template <class F>
__device__ inline void release(const Work<F>& work, const Places<F>& at) {
  if (threadIdx.x % 32 != 0) return;
  arrive(work.empty(at.weights.slot));
  arrive(work.empty(F::kStages + at.inputs.slot));
}

// A stage's products run while the next stage's are being issued; only then it is released.
template <class F>
__device__ inline void multiply_tile(const Work<F>& work, Places<F>& at,
                                     float (&c)[F::kColumnGroups][4]) {
  const int row_offset = static_cast<int>(threadIdx.x) / kGroupThreads * 64 * kDepth * 2;
  Places<F> previous = at;
  for (int step = 0; step < work.num_steps; ++step) {
    wait_barrier(work.full(F::kStages + at.inputs.slot), at.inputs.parity);
    wait_barrier(work.full(at.weights.slot), at.weights.parity);
    multiply_stage<F>(c, work.inputs(at.inputs.slot) + row_offset, work.weights(at.weights.slot),
                      step > 0);
    wgmma::wait<1>();
    if (step > 0) release(work, previous);
    previous = at;
    at.advance();
  }
  wgmma::wait<0>();
  wgmma::hold(c);  // none is read before the wait
  release(work, previous);
}

// 16 columns from `column` of this warp's 16 rows. A thread has two columns of both halves, of the
// rows lane / 4 and lane / 4 + 8; exchanged with its neighbour four of one, so that a warp stores
// whole sectors.
__device__ inline void store_columns(const Problem& p, int column, const float (&left)[4],
                                     const float (&right)[4]) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const bool is_odd = lane % 2 != 0;
  column += is_odd ? 8 + (lane % 4 - 1) * 2 : lane % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t low = packed(left[half * 2], left[half * 2 + 1]);
    const uint32_t high = packed(right[half * 2], right[half * 2 + 1]);
    const uint32_t other = __shfl_xor_sync(kFullWarp, is_odd ? low : high, 1);
    const uint2 four = is_odd ? make_uint2(other, high) : make_uint2(low, other);
    const int row = thread / 32 * 16 + half * 8 + lane / 4;
    if (row >= p.num_rows || column >= p.num_columns) continue;
    *reinterpret_cast<uint2*>(p.out + static_cast<int64_t>(row) * p.num_columns + column) = four;
  }
}

template <class F>
__device__ inline void store_tile(const Problem& p, int tile,
                                  const float (&c)[F::kColumnGroups][4]) {
#pragma unroll
  for (int i = 0; i < F::kColumnGroups; i += 2) {
    store_columns(p, tile * F::kBlocks * kBlockColumns + i * 8, c[i], c[i + 1]);
  }
}

template <class F>
__device__ inline void wait_consumers() {
  asm volatile("bar.sync 1, %0;" ::"n"(F::kConsumers) : "memory");
}

template <class F>
__device__ inline uint32_t part_address(const Work<F>& work, int group) {
  return work.ring + (group * F::kConsumers + static_cast<int>(threadIdx.x)) * 16;
}

__device__ inline void leave(uint32_t shared, const float (&c)[4]) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "f"(c[0]), "f"(c[1]),
               "f"(c[2]), "f"(c[3])
               : "memory");
}

// Whether this warp has rows of x.
template <class F>
__device__ inline bool has_rows() {
  return static_cast<int>(threadIdx.x) / 32 * 16 < F::kRows;
}

// This block's part of the tile, over the rings: all their stages have been read.
template <class F>
__device__ inline void leave_part(const Work<F>& work, const float (&c)[F::kColumnGroups][4]) {
  wait_consumers<F>();
  if (!has_rows<F>()) return;
#pragma unroll
  for (int i = 0; i < F::kColumnGroups; ++i) {
    leave(part_address(work, i), c[i]);
  }
}

// Sums of all parts, in the order of k, of every kSplits-th of the tile's pairs of column groups.
// The block arrives at the cluster's barrier between its last question and the stores after it:
// the barrier waits for answers, and would for stores.
template <class F>
__device__ inline void store_sums(const Work<F>& work, const Problem& p) {
  constexpr int kPairs = F::kColumnGroups / 2, kMine = (kPairs + F::kSplits - 1) / F::kSplits;
  // Pairs asked for before the first is added: an answer takes a microsecond, but those of 128 rows
  // are too many at a time.
  constexpr int kTogether = F::kConsumers > kGroupThreads ? 1 : kMine;
#pragma unroll
  for (int first = 0; first < kMine; first += kTogether) {
    float parts[kTogether][F::kSplits][2][4] = {};
#pragma unroll
    for (int i = 0; i < kTogether && has_rows<F>(); ++i) {
      const int pair = min((first + i) * F::kSplits + work.rank, kPairs - 1);
#pragma unroll
      for (int split = 0; split < F::kSplits; ++split) {
        load_from(part_address(work, 2 * pair), split, parts[i][split][0]);
        load_from(part_address(work, 2 * pair + 1), split, parts[i][split][1]);
      }
    }
    if (first + kTogether >= kMine) arrive_cluster();
#pragma unroll
    for (int i = 0; i < kTogether && has_rows<F>(); ++i) {
      const int pair = (first + i) * F::kSplits + work.rank;
      if (pair >= kPairs) break;
      float (&sum)[2][4] = parts[i][0];
#pragma unroll
      for (int split = 1; split < F::kSplits; ++split) {
#pragma unroll
        for (int n = 0; n < 8; ++n) sum[n / 4][n % 4] += parts[i][split][n / 4][n % 4];
      }
      store_columns(p, work.first_tile * F::kBlocks * kBlockColumns + pair * 16, sum[0], sum[1]);
    }
  }
}

// gate and up of eight columns -> what swiglu makes of them.
__device__ inline void gate_columns(float (&gate)[4], const float (&up)[4]) {
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    gate[n] = to_float(gated(from_float<bf16>(gate[n]), from_float<bf16>(up[n])));
  }
}

// This block's 64 columns and its half of the 64 that the cluster's blocks share. As in store_sums,
// nothing is stored before the block has arrived for the last time.
template <class F>
__device__ inline void store_gated(const Work<F>& work, const Problem& p,
                                   float (&c)[F::kColumnGroups][4]) {
  constexpr int kShared = 8, kUp = 16, kHalf = 4;  // column groups
  const bool is_first = work.rank == 0;
  float mine[kHalf][4], others[kHalf][4];
#pragma unroll
  for (int n = 0; n < kHalf * 4; ++n) {
    const float left = c[kShared + n / 4][n % 4], right = c[kShared + kHalf + n / 4][n % 4];
    mine[n / 4][n % 4] = is_first ? left : right;
    others[n / 4][n % 4] = is_first ? right : left;
  }
  wait_consumers<F>();  // all stages of the rings have been read
#pragma unroll
  for (int i = 0; i < kHalf; ++i) leave(part_address(work, i), others[i]);
  arrive_cluster();
  // Not of rows that x does not have: what lies there makes divisions slow [5 us, measured].
  const bool has_out = static_cast<int>(threadIdx.x) / 32 * 16 < p.num_rows;
#pragma unroll
  for (int i = 0; i < kShared && has_out; ++i) gate_columns(c[i], c[kUp + i]);
  wait_cluster();
#pragma unroll
  for (int i = 0; i < kHalf; ++i) load_from(part_address(work, i), 1 - work.rank, others[i]);
  arrive_cluster();
  if (!has_out) return;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float x = mine[i][n], y = others[i][n];
      mine[i][n] = is_first ? x : y;
      others[i][n] = is_first ? y : x;
    }
    gate_columns(mine[i], others[i]);
  }
  const int tile = work.first_tile * F::kBlocks * kBlockColumns;
#pragma unroll
  for (int i = 0; i < kShared; i += 2) {
    store_columns(p, tile + work.rank * 2 * kBlockColumns + i * 8, c[i], c[i + 1]);
  }
#pragma unroll
  for (int i = 0; i < kHalf; i += 2) {
    store_columns(p, tile + kBlockColumns + (work.rank * kHalf + i) * 8, mine[i], mine[i + 1]);
  }
}

template <class F>
__device__ void consume(const Work<F>& work, const Problem& p) {
  Places<F> at;
  float c[F::kColumnGroups][4];
  if constexpr (F::kIsGated) {
    multiply_tile<F>(work, at, c);
    store_gated<F>(work, p, c);
  } else if constexpr (F::kSplits > 1) {
    multiply_tile<F>(work, at, c);
    leave_part<F>(work, c);
    arrive_cluster();
    wait_cluster();
    store_sums<F>(work, p);
  } else {
    for (int tile = work.first_tile; tile < p.num_tiles; tile += work.tile_stride) {
      multiply_tile<F>(work, at, c);
      store_tile<F>(p, tile, c);
    }
  }
}

#endif

template <class F>
__global__ void __launch_bounds__(F::kThreads, 1)
    stream_kernel(const __grid_constant__ CUtensorMap weight_map,
                  const __grid_constant__ CUtensorMap input_map, const Problem p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char shared[];  // swizzled tiles are aligned to it
  const Work<F> work(shared, p);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == F::kConsumers) {
    prefetch_map(&weight_map);
    init_barriers(work);
  }
  let_next_start();
  __syncthreads();
  if (thread == F::kConsumers) {
    copy_weights(work, p, &weight_map);
  } else if (thread == F::kConsumers + 32) {
    prefetch_map(&input_map);
    wait_for_previous();
    copy_inputs(work, p, &input_map);
  } else if (thread < F::kConsumers) {
    wait_for_previous();
    consume(work, p);
  }
  if constexpr (F::kCluster > 1) {
    // As the consumers do: first the parts are there, then no block needs another's any more.
    if (thread >= F::kConsumers) {
      __syncwarp();
      arrive_cluster();
      wait_cluster();
      arrive_cluster();
    }
    wait_cluster();
  }
#endif
}

}  // namespace elastic_cache::cuda::stream
