// One block scans the sequences in turn, a chunk of kThreads positions at a time; within a chunk a
// position's place in the list is its rank among the flags before it. At T = 1024 that is one chunk
// per kind of row.
// The subtle thing: a position is listed once, under the first kind that claims it, so tracked
// positions are kept as bits in shared memory.
#include "elastic_cache/select_rows.h"

#include "common/launch.h"
#include "common/reduce.cuh"

namespace elastic_cache {
namespace {

constexpr int kThreads = 1024;
constexpr int kWordBits = 32;

// The lists being written; every thread holds the same counts.
struct Lists {
  int64_t num_rows = 0;
  int64_t num_window_rows = 0;
};

__device__ bool is_set(const unsigned int* bits, int64_t i) {
  return bits[i / kWordBits] >> (i % kWordBits) & 1;
}

__device__ void mark_tracked(const SelectRowsParams& p, int64_t s, unsigned int* bits) {
  const int64_t num_words = (p.capacity + kWordBits - 1) / kWordBits;
  for (int64_t w = threadIdx.x; w < num_words; w += kThreads) bits[w] = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < p.num_layers * p.track_num; i += kThreads) {
    const int64_t layer = i / p.track_num, k = i % p.track_num;
    const int32_t chosen = p.tracked[(layer * p.num_sequences + s) * p.track_num + k];
    if (chosen >= 0 && chosen < p.capacity) {
      atomicOr(bits + chosen / kWordBits, 1u << (chosen % kWordBits));  // any order, same bits
    }
  }
  __syncthreads();
}

// Lists the positions for which `flag` holds, at most `limit` of them; returns how many.
template <class Flag>
__device__ int64_t append(const SelectRowsParams& p, int64_t s, int64_t limit, const Flag& flag,
                          bool is_window, Lists& lists, int* shared) {
  int64_t count = 0;
  for (int64_t begin = 0; begin < p.capacity && count < limit; begin += kThreads) {
    const int64_t i = begin + threadIdx.x;
    const bool is_listed = i < p.capacity && flag(i);
    int in_chunk = 0;
    const int64_t rank = count + cuda::block_rank(is_listed, shared, &in_chunk);
    const int64_t at = lists.num_rows + rank;
    if (is_listed && rank < limit && at < p.max_rows) {
      p.rows[at] = static_cast<int32_t>(s * p.capacity + i);
      if (is_window && lists.num_window_rows + rank < p.max_window) {
        p.window_rows[lists.num_window_rows + rank] = static_cast<int32_t>(at);
      }
    }
    count += in_chunk;
  }
  count = count < limit ? count : limit;
  lists.num_rows += count;
  if (is_window) lists.num_window_rows += count;
  return count;
}

__global__ void __launch_bounds__(kThreads) select_rows_kernel(SelectRowsParams p) {
  extern __shared__ unsigned int is_tracked[];  // [ceil(C / 32)]
  __shared__ int shared[kThreads / cuda::kWarpSize];
  Lists lists;
  for (int64_t s = 0; s < p.num_sequences; ++s) {
    const bool* masked = p.masked + s * p.capacity;
    const bool* committed = p.committed + s * p.capacity;
    const int64_t begin = lists.num_rows;
    mark_tracked(p, s, is_tracked);
    const auto tracked = [&](int64_t i) { return is_set(is_tracked, i); };
    const auto newly = [&](int64_t i) { return committed[i] && !is_set(is_tracked, i); };
    // Masked positions after the window's last one are the lookahead's: they are found by skipping
    // as many as the window took.
    const auto waiting = [&](int64_t i) {
      return masked[i] && !committed[i] && !is_set(is_tracked, i);
    };
    const int64_t num_tracked = append(p, s, p.capacity, tracked, false, lists, shared);
    const int64_t num_committed = append(p, s, p.capacity, newly, false, lists, shared);
    const int64_t first_waiting = lists.num_rows;
    const int64_t num_window = append(p, s, p.window[s], waiting, true, lists, shared);
    int64_t num_lookahead = 0;
    if (p.lookahead[s] > 0 && num_window == p.window[s]) {
      lists.num_rows = first_waiting;  // the window's rows are written again, the same
      const int64_t limit = num_window + p.lookahead[s];
      num_lookahead = append(p, s, limit, waiting, false, lists, shared) - num_window;
    }
    if (threadIdx.x == 0) {
      int32_t* segment = p.segments + s * kSegmentColumns;
      segment[kSegmentBegin] = static_cast<int32_t>(begin);
      segment[kSegmentTracked] = static_cast<int32_t>(num_tracked);
      segment[kSegmentCommitted] = static_cast<int32_t>(num_committed);
      segment[kSegmentWindow] = static_cast<int32_t>(num_window);
      segment[kSegmentLookahead] = static_cast<int32_t>(num_lookahead);
    }
  }
  for (int64_t i = lists.num_rows + threadIdx.x; i < p.max_rows; i += kThreads) p.rows[i] = -1;
  for (int64_t i = lists.num_window_rows + threadIdx.x; i < p.max_window; i += kThreads) {
    p.window_rows[i] = -1;
  }
}

}  // namespace

void select_rows_cuda(const SelectRowsParams& params, Stream stream) {
  const auto words = static_cast<size_t>((params.capacity + kWordBits - 1) / kWordBits);
  select_rows_kernel<<<1, kThreads, words * sizeof(unsigned int), stream>>>(params);
  cuda::check_launch("select_rows");
}

}  // namespace elastic_cache
