// One block, because a sequence's rows begin where those of the sequences before it end. It takes
// up to 32 sequences at once: all threads fetch what is known about their positions, as bits in
// shared memory; then a warp a sequence counts, learns from the other warps where its rows begin,
// and writes them. Sequences thus wait for memory together, not one after the other.
// The subtle thing: a position is listed once, under the first kind that claims it. Of the waiting
// positions, the last kind, the first ones are the window's and the next the lookahead's; for the
// others there is no place before the sequence's end.
#include "elastic_cache/select_rows.h"

#include <algorithm>

#include "common/launch.h"
#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace elastic_cache {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / cuda::kWarpSize;
static_assert(kWarps == cuda::kWarpSize);  // a lane looks at what a warp has counted
constexpr int kWordBits = 32;
constexpr int kMarkers = kThreads / 2;  // threads that mark tracked positions; others load flags
constexpr int kBatch = 8;  // tracked positions a thread asks for before it looks at the first

// A bit for each position of some sequences, in whole words.
struct Bits {
  unsigned int* masked;
  unsigned int* committed;
  unsigned int* tracked;

  __device__ Bits from(int word) const { return {masked + word, committed + word, tracked + word}; }
};

// The sequences that the block works on.
struct Group {
  int64_t first;
  int count;
  int num_words;  // of a sequence
};

// How long the lists are: those of a sequence, or of all sequences before it.
struct Lengths {
  int rows;
  int window_rows;
};

struct Counts {
  int tracked;
  int committed;
  int window;
  int lookahead;
};

// Four bools, bytes of 0 or 1, as four bits: the product moves byte i to bit 24 + i.
__device__ unsigned int four_bits(unsigned int bools) { return bools * 0x01020408u >> 24; }

__device__ unsigned int as_bits(const uint4& bools) {
  return four_bits(bools.x) | four_bits(bools.y) << 4 | four_bits(bools.z) << 8 |
         four_bits(bools.w) << 12;
}

// The flags of the 32 positions from `begin` on, N loaded at a time: as they lie in memory, so that
// others can be asked for before these are looked at.
template <int N>
struct Flags {
  static_assert(N == 16);
  uint4 low{}, high{};

  __device__ Flags(const bool* flags, int64_t begin, int64_t capacity) {
    if (begin < capacity) low = cuda::load_raw<bool, N>(flags + begin);
    if (begin + N < capacity) high = cuda::load_raw<bool, N>(flags + begin + N);
  }
  __device__ unsigned int bits() const { return as_bits(low) | as_bits(high) << N; }
};

// One by one they would fill all registers, and are made bits at once.
template <>
struct Flags<1> {
  unsigned int word = 0;

  __device__ Flags(const bool* flags, int64_t begin, int64_t capacity) {
#pragma unroll
    for (int i = 0; i < kWordBits; ++i) {
      if (begin + i < capacity) word |= static_cast<unsigned int>(flags[begin + i]) << i;
    }
  }
  __device__ unsigned int bits() const { return word; }
};

template <int N>
__device__ void load_flags(const SelectRowsParams& p, const Group& group, int thread,
                           const Bits& bits) {
  for (int i = thread; i < group.count * group.num_words; i += kThreads - kMarkers) {
    const int64_t slot = (group.first + i / group.num_words) * p.capacity;
    const int64_t begin = int64_t{i % group.num_words} * kWordBits;
    const Flags<N> masked(p.masked + slot, begin, p.capacity);
    const Flags<N> committed(p.committed + slot, begin, p.capacity);
    bits.masked[i] = masked.bits();
    bits.committed[i] = committed.bits();
  }
}

// A layer's lists of the group are one after the other in memory. A thread stays in its column of
// them while it goes through the layers, so that it need not divide to know its sequence.
__device__ void mark_tracked(const SelectRowsParams& p, const Group& group, int thread,
                             const Bits& bits) {
  const int track_num = static_cast<int>(p.track_num), width = group.count * track_num;
  if (width == 0) return;
  const int num_columns = min(width, kMarkers), layers_at_once = kMarkers / num_columns;
  const int first_layer = thread / num_columns;
  if (first_layer >= layers_at_once) return;
  const int64_t layer_stride = p.num_sequences * p.track_num;
  const int64_t step = layers_at_once * layer_stride;
  for (int column = thread % num_columns; column < width; column += num_columns) {
    const int32_t* at = p.tracked + first_layer * layer_stride + group.first * track_num + column;
    unsigned int* tracked = bits.tracked + column / track_num * group.num_words;
    for (int64_t layer = first_layer; layer < p.num_layers; layer += kBatch * layers_at_once) {
      int32_t chosen[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i, at += step) {
        chosen[i] = layer + i * layers_at_once < p.num_layers ? *at : -1;
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (chosen[i] < 0 || chosen[i] >= p.capacity) continue;
        atomicOr(tracked + chosen[i] / kWordBits, 1u << (chosen[i] % kWordBits));  // in any order
      }
    }
  }
}

// Fills `bits`. Half of the threads mark, half load, so that both wait for memory at the same time.
template <int N>
__device__ void fetch(const SelectRowsParams& p, const Group& group, const Bits& bits) {
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll 1  // here and below: a round or two, for which more code is only fetched for longer
  for (int i = thread; i < group.count * group.num_words; i += kThreads) bits.tracked[i] = 0;
  __syncthreads();
  if (thread < kMarkers) {
    mark_tracked(p, group, thread, bits);
  } else {
    load_flags<N>(p, group, thread - kMarkers, bits);
  }
  __syncthreads();
}

// 32 positions, each under the one kind that claims it.
struct Kinds {
  unsigned int tracked = 0;
  unsigned int committed = 0;
  unsigned int waiting = 0;
};

__device__ Kinds kinds_of(const Bits& sequence, int word, int num_words) {
  if (word >= num_words) return {};
  const unsigned int tracked = sequence.tracked[word], committed = sequence.committed[word];
  return {tracked, committed & ~tracked, sequence.masked[word] & ~committed & ~tracked};
}

__device__ Counts count_rows(const Bits& sequence, int num_words, int window, int lookahead) {
  int tracked = 0, committed = 0, waiting = 0;
#pragma unroll 1
  for (int word = static_cast<int>(threadIdx.x) % cuda::kWarpSize; word < num_words;
       word += cuda::kWarpSize) {
    const Kinds kinds = kinds_of(sequence, word, num_words);
    tracked += __popc(kinds.tracked);
    committed += __popc(kinds.committed);
    waiting += __popc(kinds.waiting);
  }
  tracked = cuda::warp_reduce(tracked, cuda::Sum{});
  committed = cuda::warp_reduce(committed, cuda::Sum{});
  waiting = cuda::warp_reduce(waiting, cuda::Sum{});
  const int num_window = min(max(window, 0), waiting);
  if (num_window == 0) return {};
  return {tracked, committed, num_window, min(max(lookahead, 0), waiting - num_window)};
}

// Where this warp's lists begin, given how long they are; `end`, where those of the first warp do,
// moves behind those of the last.
__device__ Lengths place(const Lengths& mine, Lengths* shared, Lengths& end) {
  const int lane = static_cast<int>(threadIdx.x) % cuda::kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / cuda::kWarpSize;
  if (lane == 0) shared[warp] = mine;
  __syncthreads();
  const int rows = end.rows + cuda::sum_through(shared[lane].rows);
  const int window_rows = end.window_rows + cuda::sum_through(shared[lane].window_rows);
  const auto from = [](int value, int which) { return __shfl_sync(cuda::kFullWarp, value, which); };
  end = {from(rows, kWarps - 1), from(window_rows, kWarps - 1)};
  return {from(rows, warp) - mine.rows, from(window_rows, warp) - mine.window_rows};
}

// A lane writes the rows of one word in 32, because chosen positions lie close together: words side
// by side are then written at the same time.
__device__ void write_rows(const SelectRowsParams& p, int64_t s, const Bits& sequence,
                           int num_words, const Counts& counts, const Lengths& begin) {
  const int lane = static_cast<int>(threadIdx.x) % cuda::kWarpSize;
  const int first_committed = begin.rows + counts.tracked;
  const int first_waiting = first_committed + counts.committed;
  const int end_of_window = first_waiting + counts.window;
  const auto end = static_cast<int>(min(int64_t{end_of_window + counts.lookahead}, p.max_rows));
  const auto next_of = [](int place, int last) {
    return __shfl_sync(cuda::kFullWarp, place + last, cuda::kWarpSize - 1);
  };
  int next_tracked = begin.rows, next_committed = first_committed, next_waiting = first_waiting;
  for (int first = 0; first < num_words; first += cuda::kWarpSize) {
    const Kinds kinds = kinds_of(sequence, first + lane, num_words);
    const int num_tracked = __popc(kinds.tracked), num_committed = __popc(kinds.committed);
    const int num_waiting = __popc(kinds.waiting);
    int tracked_at = next_tracked + cuda::sum_through(num_tracked) - num_tracked;
    int committed_at = next_committed + cuda::sum_through(num_committed) - num_committed;
    int waiting_at = next_waiting + cuda::sum_through(num_waiting) - num_waiting;
    next_tracked = next_of(tracked_at, num_tracked);
    next_committed = next_of(committed_at, num_committed);
    next_waiting = next_of(waiting_at, num_waiting);
    const auto slot = static_cast<int32_t>(s * p.capacity + (first + lane) * kWordBits);
    unsigned int left = kinds.tracked | kinds.committed | (waiting_at < end ? kinds.waiting : 0);
    for (; left != 0; left &= left - 1) {
      const unsigned int bit = left & -left;
      const int at = kinds.tracked & bit     ? tracked_at++
                     : kinds.committed & bit ? committed_at++
                                             : waiting_at++;
      if (at >= end) continue;
      p.rows[at] = slot + __ffs(bit) - 1;
      const int window_at = begin.window_rows + at - first_waiting;
      if (at >= first_waiting && at < end_of_window && window_at < p.max_window) {
        p.window_rows[window_at] = at;
      }
    }
  }
}

__device__ void write_segment(int32_t* segment, const Counts& counts, const Lengths& begin) {
  segment[kSegmentBegin] = begin.rows;
  segment[kSegmentTracked] = counts.tracked;
  segment[kSegmentCommitted] = counts.committed;
  segment[kSegmentWindow] = counts.window;
  segment[kSegmentLookahead] = counts.lookahead;
}

__device__ void pad(int32_t* list, int64_t end, int64_t size) {
#pragma unroll 1
  for (int64_t i = end + threadIdx.x; i < size; i += kThreads) list[i] = -1;
}

template <int N>
__global__ void __launch_bounds__(kThreads) select_rows_kernel(SelectRowsParams p, int group_size) {
  extern __shared__ unsigned int words[];  // [3, group_size, ceil(C / 32)]
  __shared__ Lengths shared[kWarps];
  cuda::wait_for_previous();
  const int num_words = static_cast<int>((p.capacity + kWordBits - 1) / kWordBits);
  const int stride = group_size * num_words;
  const Bits bits{words, words + stride, words + 2 * stride};
  const int warp = static_cast<int>(threadIdx.x) / cuda::kWarpSize;
  Lengths end{};  // of the lists so far, the same in every thread
  for (int64_t first = 0; first < p.num_sequences; first += group_size) {
    const auto count = static_cast<int>(min(int64_t{group_size}, p.num_sequences - first));
    const int64_t s = first + warp;
    const bool has_sequence = warp < count;
    const int window = has_sequence ? p.window[s] : 0;  // asked for ahead of the barriers
    const int lookahead = has_sequence ? p.lookahead[s] : 0;
    fetch<N>(p, {first, count, num_words}, bits);
    const Bits sequence = bits.from(warp * num_words);
    Counts counts{};
    if (has_sequence) counts = count_rows(sequence, num_words, window, lookahead);
    const int num_rows = counts.tracked + counts.committed + counts.window + counts.lookahead;
    const Lengths begin = place({num_rows, counts.window}, shared, end);
    if (has_sequence) {
      write_rows(p, s, sequence, num_words, counts, begin);
      if (threadIdx.x % cuda::kWarpSize == 0) {
        write_segment(p.segments + s * kSegmentColumns, counts, begin);
      }
    }
    __syncthreads();  // the next group's bits take the place of these
  }
  pad(p.rows, end.rows, p.max_rows);
  pad(p.window_rows, end.window_rows, p.max_window);
}

// As many sequences at once as there are warps, or fewer long ones, for which shared memory would
// not do: 64 KB, which every GPU has, are 32 of 5,440 positions.
int group_size_for(int64_t sequence_bytes) {
  constexpr int64_t kGroupBytes = 64 * 1024;
  const int64_t fitting = kGroupBytes / std::max(sequence_bytes, int64_t{1});
  return static_cast<int>(std::clamp(fitting, int64_t{1}, int64_t{kWarps}));
}

}  // namespace

void select_rows_cuda(const SelectRowsParams& params, Stream stream) {
  const int64_t num_words = (params.capacity + kWordBits - 1) / kWordBits;
  const int64_t sequence_bytes = 3 * num_words * static_cast<int64_t>(sizeof(unsigned int));
  const int64_t group_size =
      std::min<int64_t>(group_size_for(sequence_bytes), std::max<int64_t>(params.num_sequences, 1));
  const cuda::SharedBytes shared{static_cast<size_t>(group_size * sequence_bytes)};
  const bool has_vectors =
      cuda::are_vectors<bool>({params.masked, params.committed}, {params.capacity});
  cuda::with_pack_size<bool>(has_vectors, [&](auto size) {
    cuda::launch_overlapping("select_rows", select_rows_kernel<decltype(size)::value>, dim3(1),
                             kThreads, stream, shared, params, static_cast<int>(group_size));
  });
}

}  // namespace elastic_cache
