// out[M, N] = x[M, K] w[K, N] for few rows: a stream of the weights through shared memory.
//
// The weights do not depend on the kernel before this one, so their copies begin before it has
// ended; only the copies of x wait for it. A block owns a tile of 64 kBlocks columns and one of
// kSplits ranges of k. The splits of a tile are a cluster and add their parts up through
// distributed shared memory, in the order of k: no workspace, no counters.
//
// The gated form's w is [K, 2N], gate, then up, and out is what swiglu makes of x w. Two blocks, a
// cluster, have 192 columns of each: the first the gate of columns 0 .. 127 and up of 0 .. 63, the
// second the gate of 128 .. 191 and up of 64 .. 191. So two warpgroups have gate and up of the same
// 64 columns, in one block or in both, and each finishes half of the rows.
//
// A warpgroup multiplies 64 columns with all rows, w^T x^T: so its products are as wide as there
// are rows, and not a multiple of 64. More rows than a form has are cut into chunks, each a block's
// (or cluster's) with the same columns: chunks of a tile follow each other, so that what one reads
// of the weights the next finds in the second-level cache. A sum's order depends neither on the
// form nor on the chunk: so a row's result is the same whatever rows are beside it.
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
constexpr int kMaxRows = 256;               // of a form
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
  static constexpr int kGroups = kRows / 8;  // of eight rows
  static constexpr int kBlockBytes = kDepth * kBlockColumns * 2;
  static constexpr int kWeightBytes = kBlocks * kBlockBytes;
  static constexpr int kInputBytes = kRows * kDepth * 2;
  static constexpr int kInputStages = std::clamp(kInputRingBytes / kInputBytes, 3, 12);
  static constexpr int kConsumers = kBlocks * kGroupThreads;
  // A warp copies weights, a warp copies x. Sums of more than 192 rows take more registers than a
  // thread begins with: there the two warps are a warpgroup, which leaves its own to the others,
  // and a product is two instructions, as one may not have more than a thread begins with.
  static constexpr bool kIsTall = kRows > 192;
  static constexpr int kThreads = kConsumers + (kIsTall ? kGroupThreads : 64);
  static constexpr int kRegisters = kBlocks == 3 ? 160 : 216;  // of a thread that multiplies
  static constexpr int kPartBytes = kConsumers * kGroups * 16;
  static constexpr int kInputRing = kInputStages * kInputBytes;
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
  const bf16* bias;  // or null; not of the gated form
  int num_rows;
  int num_columns;  // of out
  int num_steps;    // stages of the whole of k
  int num_chunks;   // of rows
  int num_items;    // tiles times chunks
  int window;       // stages
};

// The rings in shared memory, and what a block has to do.
template <class F>
struct Work {
  uint32_t ring;
  int rank;        // in the cluster; which split of k, or of a gated tile
  int first_item;  // a tile's chunk
  int item_stride;
  int first_step;
  int num_steps;

  __device__ Work(const void* shared, const Problem& p) {
    ring = shared_address(shared);
    const int block = static_cast<int>(blockIdx.x);
    rank = block % F::kCluster;
    first_item = block / F::kCluster;
    item_stride = static_cast<int>(gridDim.x) / F::kCluster;
    const int split = F::kIsGated ? 0 : rank;
    first_step = p.num_steps * split / F::kSplits;
    num_steps = p.num_steps * (split + 1) / F::kSplits - first_step;
  }

  __device__ int k(int step) const { return (first_step + step) * kDepth; }
  __device__ static int tile(const Problem& p, int item) { return item / p.num_chunks; }
  __device__ static int first_row(const Problem& p, int item) {
    return item % p.num_chunks * F::kRows;
  }
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
  for (int item = work.first_item; item < p.num_items; item += work.item_stride) {
    const int tile = work.tile(p, item);
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
  for (int item = work.first_item; item < p.num_items; item += work.item_stride) {
    const int row = work.first_row(p, item);
    for (int step = 0; step < work.num_steps; ++step, place.advance()) {
      const int slot = F::kStages + place.slot;
      wait_barrier(work.empty(slot), place.parity ^ 1);
      expect_bytes(work.full(slot), F::kInputBytes);
      copy_box(work.inputs(place.slot), map, work.full(slot), work.k(step), row, policy);
    }
  }
}

// Begins c (64 columns x the rows) += the stage's product; keep false: c = it.
template <class F>
__device__ inline void multiply_stage(float (&c)[F::kGroups][4], uint32_t inputs, uint32_t weights,
                                      bool keep) {
  constexpr int kFirst = F::kIsTall ? 16 : F::kGroups, kSecond = F::kGroups - kFirst;
  auto& first = reinterpret_cast<float (&)[kFirst][4]>(c[0]);
  wgmma::begin();
#pragma unroll
  for (int k = 0; k < kDepth; k += kInstructionDepth) {
    const uint64_t a = wgmma::operand<0>(weights + k * kBlockColumns * 2);
    const uint64_t b = wgmma::operand<0>(inputs + k * 2);
    wgmma::multiply_transposed<kFirst, true>(first, a, b, keep || k > 0);
    if constexpr (F::kIsTall) {
      auto& second = reinterpret_cast<float (&)[kSecond][4]>(c[kFirst]);
      const uint64_t further = wgmma::operand<0>(inputs + (kFirst * 8 * kDepth + k) * 2);
      wgmma::multiply_transposed<kSecond, true>(second, a, further, keep || k > 0);
    }
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
                                     float (&c)[F::kGroups][4]) {
  const int block = static_cast<int>(threadIdx.x) / kGroupThreads * F::kBlockBytes;
  Places<F> previous = at;
  for (int step = 0; step < work.num_steps; ++step) {
    wait_barrier(work.full(F::kStages + at.inputs.slot), at.inputs.parity);
    wait_barrier(work.full(at.weights.slot), at.weights.parity);
    multiply_stage<F>(c, work.inputs(at.inputs.slot), work.weights(at.weights.slot) + block,
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

// Turns an 8 x 8 matrix, of which a thread has two neighbours in row lane / 4.
__device__ inline uint32_t turned(uint32_t pair) {
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(pair));
  return pair;
}

// 16 columns from `column` on of eight rows from `row` on. A thread has two rows of column lane / 4
// and of lane / 4 + 8; turned, two columns of both halves of a row, and exchanged with its
// neighbour four of one, so that a warp stores whole sectors.
__device__ inline void store_rows(const Problem& p, int row, int column,
                                  const uint32_t (&pairs)[2]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const uint32_t low = turned(pairs[0]), high = turned(pairs[1]);
  const bool is_odd = lane % 2 != 0;
  const uint32_t other = __shfl_xor_sync(kFullWarp, is_odd ? low : high, 1);
  const uint2 four = is_odd ? make_uint2(other, high) : make_uint2(low, other);
  row += lane / 4;
  column += is_odd ? 8 + (lane % 4 - 1) * 2 : lane % 4 * 2;
  if (row >= p.num_rows || column >= p.num_columns) return;
  *reinterpret_cast<uint2*>(p.out + static_cast<int64_t>(row) * p.num_columns + column) = four;
}

// The bias of this thread's columns, of 16 from `column` on.
__device__ inline float2 bias_of(const Problem& p, int column) {
  const int first = column + static_cast<int>(threadIdx.x) % 32 / 4;
  const auto at = [&](int i) {
    return p.bias != nullptr && i < p.num_columns ? to_float(p.bias[i]) : 0.0f;
  };
  return make_float2(at(first), at(first + 8));
}

__device__ inline void store_rows(const Problem& p, int row, int column, const float (&c)[4],
                                  float2 bias) {
  store_rows(p, row, column,
             {packed(c[0] + bias.x, c[1] + bias.x), packed(c[2] + bias.y, c[3] + bias.y)});
}

// The first of this warp's 16 columns.
template <class F>
__device__ inline int first_column(int tile) {
  return tile * F::kBlocks * kBlockColumns + static_cast<int>(threadIdx.x) / 32 * 16;
}

template <class F>
__device__ inline void store_tile(const Problem& p, int tile, int row,
                                  const float (&c)[F::kGroups][4]) {
  const int column = first_column<F>(tile);
  const float2 bias = bias_of(p, column);
#pragma unroll
  for (int i = 0; i < F::kGroups; ++i, row += 8) {
    if (row < p.num_rows) store_rows(p, row, column, c[i], bias);
  }
}

template <class F>
__device__ inline void wait_consumers() {
  asm volatile("bar.sync 1, %0;" ::"n"(F::kConsumers) : "memory");
}

// Where a thread leaves so many bytes of a group of rows for others.
template <int kBytes, class F>
__device__ inline uint32_t part_address(const Work<F>& work, int group, int thread) {
  return work.ring + (group * F::kConsumers + thread) * kBytes;
}

__device__ inline void leave(uint32_t shared, const uint32_t (&c)[2]) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(shared), "r"(c[0]), "r"(c[1]) : "memory");
}

__device__ inline void leave(uint32_t shared, const float (&c)[4]) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "f"(c[0]), "f"(c[1]),
               "f"(c[2]), "f"(c[3])
               : "memory");
}

// This block's part of the tile, over the rings: all their stages have been read.
template <class F>
__device__ inline void leave_part(const Work<F>& work, const float (&c)[F::kGroups][4]) {
  const int thread = static_cast<int>(threadIdx.x);
  wait_consumers<F>();
#pragma unroll
  for (int i = 0; i < F::kGroups; ++i) leave(part_address<16>(work, i, thread), c[i]);
}

// Sums of all parts, in the order of k, of every kSplits-th group of rows. The block arrives at the
// cluster's barrier between its last question and the stores after it: the barrier waits for
// answers, and would for stores.
template <class F>
__device__ inline void store_sums(const Work<F>& work, const Problem& p) {
  constexpr int kMine = (F::kGroups + F::kSplits - 1) / F::kSplits;
  // Groups asked for before the first is added: an answer takes a microsecond.
  constexpr int kTogether = kMine < 8 ? kMine : 8;
  const int thread = static_cast<int>(threadIdx.x), item = work.first_item;
  const int first_row = work.first_row(p, item), column = first_column<F>(work.tile(p, item));
  const float2 bias = bias_of(p, column);
#pragma unroll
  for (int first = 0; first < kMine; first += kTogether) {
    float parts[kTogether][F::kSplits][4];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int group = (first + i) * F::kSplits + work.rank;
      if (group >= F::kGroups || first_row + group * 8 >= p.num_rows) break;
#pragma unroll
      for (int split = 0; split < F::kSplits; ++split) {
        load_from(part_address<16>(work, group, thread), split, parts[i][split]);
      }
    }
    if (first + kTogether >= kMine) arrive_cluster();
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int group = (first + i) * F::kSplits + work.rank;
      if (group >= F::kGroups || first_row + group * 8 >= p.num_rows) break;
      float (&sum)[4] = parts[i][0];
#pragma unroll
      for (int split = 1; split < F::kSplits; ++split) {
#pragma unroll
        for (int n = 0; n < 4; ++n) sum[n] += parts[i][split][n];
      }
      store_rows(p, first_row + group * 8, column, sum, bias);
    }
  }
}

// gate and up of two elements -> what swiglu makes of them.
__device__ inline uint32_t gated_pair(uint32_t gate, uint32_t up) {
  const auto element = [](uint32_t pair, int i) {
    return __ushort_as_bfloat16(static_cast<unsigned short>(pair >> 16 * i));
  };
  return packed(to_float(gated(element(gate, 0), element(up, 0))),
                to_float(gated(element(gate, 1), element(up, 1))));
}

// This warpgroup has gate or up of 64 columns for all rows, its partner the other: who has gate
// finishes the first half of the rows. As in store_sums, nothing is stored before the block has
// arrived for the last time.
template <class F>
__device__ inline void store_gated(const Work<F>& work, const Problem& p,
                                   const float (&c)[F::kGroups][4]) {
  constexpr int kHalf = F::kGroups / 2;
  const int thread = static_cast<int>(threadIdx.x), group = thread / kGroupThreads;
  const bool is_shared = group == 1, has_gate = is_shared ? work.rank == 0 : group == 0;
  uint32_t mine[kHalf][2], others[kHalf][2];
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const uint32_t first = packed(c[i][2 * n], c[i][2 * n + 1]);
      const uint32_t second = packed(c[kHalf + i][2 * n], c[kHalf + i][2 * n + 1]);
      mine[i][n] = has_gate ? first : second;
      others[i][n] = has_gate ? second : first;
    }
  }
  wait_consumers<F>();  // all stages of the rings have been read
#pragma unroll
  for (int i = 0; i < kHalf; ++i) leave(part_address<8>(work, i, thread), others[i]);
  arrive_cluster();
  wait_cluster();
  const int partner = is_shared ? thread : thread + (1 - group) * 2 * kGroupThreads;
  const int rank = is_shared ? 1 - work.rank : work.rank;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) load_from(part_address<8>(work, i, partner), rank, others[i]);
  arrive_cluster();
  const int item = work.first_item, first_row = work.first_row(p, item);
  const int block = work.tile(p, item) * F::kBlocks + (is_shared ? 1 : work.rank * 2);
  const int column = block * kBlockColumns + thread % kGroupThreads / 32 * 16;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const int row = first_row + ((has_gate ? 0 : kHalf) + i) * 8;
    if (row >= p.num_rows) break;
    uint32_t out[2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const uint32_t x = mine[i][n], y = others[i][n];
      out[n] = gated_pair(has_gate ? x : y, has_gate ? y : x);
    }
    store_rows(p, row, column, out);
  }
}

template <class F>
__device__ void consume(const Work<F>& work, const Problem& p) {
  Places<F> at;
  float c[F::kGroups][4];
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
    for (int item = work.first_item; item < p.num_items; item += work.item_stride) {
      multiply_tile<F>(work, at, c);
      store_tile<F>(p, work.tile(p, item), work.first_row(p, item), c);
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
  if (thread >= F::kConsumers) {
    if constexpr (F::kIsTall) wgmma::give_registers<24>();
    if (thread == F::kConsumers) {
      copy_weights(work, p, &weight_map);
    } else if (thread == F::kConsumers + 32) {
      prefetch_map(&input_map);
      wait_for_previous();
      copy_inputs(work, p, &input_map);
    }
    if constexpr (F::kCluster > 1) {
      // As the consumers do: first the parts are there, then no block needs another's any more.
      __syncwarp();
      arrive_cluster();
      wait_cluster();
      arrive_cluster();
      wait_cluster();
    }
  } else {
    if constexpr (F::kIsTall) wgmma::take_registers<F::kRegisters>();
    wait_for_previous();
    consume(work, p);
    if constexpr (F::kCluster > 1) wait_cluster();
  }
#endif
}

}  // namespace elastic_cache::cuda::stream
