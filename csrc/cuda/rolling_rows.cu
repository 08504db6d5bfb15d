// One block a sequence, kThreads positions at a time. How due a position must be to be chosen is
// found bit by bit, from the highest bit down: a bit stays set if enough positions are at least
// that due. Places in the list are ranks among flags. The subtle thing: all numbers lie in shared
// memory meanwhile, first what kind of position it is (kInWindow .. kOther), then how due it is,
// negative for positions that are computed anyway.
#include "elastic_cache/rolling_rows.h"

#include <climits>

#include "common/launch.h"
#include "common/reduce.cuh"

namespace elastic_cache {
namespace {

constexpr int kThreads = 1024;
constexpr int kInWindow = -2, kCommitted = -1, kAhead = 0, kOther = 1;

struct Sequence {
  const bool* masked;
  const bool* committed;
  int64_t begin;
  int64_t end;
};

struct Kinds {
  int64_t first;   // the leftmost waiting position
  int64_t budget;  // rows of the step that are left for positions not computed anyway
};

// Every position's kind.
__device__ Kinds sort_out(const RollingRowsParams& p, const Sequence& sequence, int* kinds,
                          int* shared, int64_t* first) {
  const int64_t window = p.window[blockIdx.x];
  if (threadIdx.x == 0) *first = sequence.end;
  int64_t num_waiting = 0, num_computed = 0;
  for (int64_t chunk = sequence.begin; chunk < sequence.end; chunk += kThreads) {
    const int64_t i = chunk + threadIdx.x;
    const bool is_committed = i < sequence.end && sequence.committed[i];
    const bool is_waiting = i < sequence.end && sequence.masked[i] && !is_committed;
    int in_chunk = 0;
    const int64_t rank = num_waiting + cuda::block_rank(is_waiting, shared, &in_chunk);
    num_waiting += in_chunk;
    const bool is_in_window = is_waiting && rank < window;
    num_computed += __syncthreads_count(is_committed || is_in_window);
    if (i >= sequence.end) continue;
    if (is_waiting && rank == 0) *first = i;
    kinds[i] = is_committed                            ? kCommitted
               : is_in_window                          ? kInWindow
               : is_waiting && rank < window + p.ahead ? kAhead
                                                       : kOther;
  }
  __syncthreads();
  return {*first, p.num_rows[blockIdx.x] - num_computed};
}

// In place of the kind of every position not computed anyway, how due it is.
__device__ void grow(const RollingRowsParams& p, const Sequence& sequence, int64_t first,
                     const int* before, int* due) {
  const auto reach = static_cast<unsigned int>(p.reach);
  for (int64_t i = sequence.begin + threadIdx.x; i < sequence.end; i += kThreads) {
    const int kind = due[i];
    if (kind < 0) continue;
    const auto distance = static_cast<unsigned int>(i < first ? first - i : i - first);
    const unsigned int sum = static_cast<unsigned int>(before[i]) +
                             static_cast<unsigned int>(kDueUnit) * reach / (reach + distance);
    const int grown = static_cast<int>(min(sum, static_cast<unsigned int>(INT_MAX)));
    due[i] = kind == kAhead ? max(grown, kUrgent) : grown;
  }
  __syncthreads();
}

__device__ int64_t count_from(const Sequence& sequence, const int* due, int least) {
  int64_t count = 0;
  for (int64_t chunk = sequence.begin; chunk < sequence.end; chunk += kThreads) {
    const int64_t i = chunk + threadIdx.x;
    count += __syncthreads_count(i < sequence.end && due[i] >= least);
  }
  return count;
}

// The greatest number such that at least `budget` positions are that due or more (a number that
// none is, if the budget is 0); 0 if there are fewer positions.
__device__ int find_threshold(const Sequence& sequence, const int* due, int64_t budget) {
  int threshold = 0;
  for (int bit = 1 << 30; bit > 0; bit >>= 1) {
    if (count_from(sequence, due, threshold | bit) >= budget) threshold |= bit;
  }
  return threshold;
}

__device__ int left(int due, bool is_chosen, int64_t repeats) {
  if (due == kInWindow) return 0;
  if (due == kCommitted) return static_cast<int>(repeats) * kUrgent;
  return is_chosen ? max(due / kUrgent - 1, 0) * kUrgent : due;
}

__global__ void __launch_bounds__(kThreads) rolling_rows_kernel(RollingRowsParams p) {
  extern __shared__ int due[];  // [C]
  __shared__ int shared[kThreads / cuda::kWarpSize];
  __shared__ int64_t first;
  const int64_t s = blockIdx.x, slot = s * p.capacity;
  const Sequence sequence{p.masked + slot, p.committed + slot, p.key_range[2 * s],
                          p.key_range[2 * s + 1]};
  int32_t* chosen = p.chosen + s * p.max_chosen;
  const Kinds kinds = sort_out(p, sequence, due, shared, &first);
  grow(p, sequence, kinds.first, p.due + slot, due);
  const int64_t budget = min(max(kinds.budget, int64_t{0}), p.max_chosen);
  const int threshold = find_threshold(sequence, due, budget);
  // Of the positions exactly that due, the first ones.
  int64_t num_equal =
      threshold == INT_MAX ? budget : budget - count_from(sequence, due, threshold + 1);
  int64_t num_chosen = 0;
  for (int64_t chunk = sequence.begin; chunk < sequence.end; chunk += kThreads) {
    const int64_t i = chunk + threadIdx.x;
    const int is_due = i < sequence.end ? due[i] : kInWindow;
    int in_chunk = 0;
    const int equal_rank = cuda::block_rank(is_due == threshold, shared, &in_chunk);
    const bool is_chosen = is_due > threshold || (is_due == threshold && equal_rank < num_equal);
    num_equal -= in_chunk;
    const int64_t rank = num_chosen + cuda::block_rank(is_chosen, shared, &in_chunk);
    num_chosen += in_chunk;
    if (is_chosen) chosen[rank] = static_cast<int32_t>(i);
    if (i < sequence.end) p.due[slot + i] = left(is_due, is_chosen, p.repeats);
  }
  for (int64_t i = num_chosen + threadIdx.x; i < p.max_chosen; i += kThreads) chosen[i] = -1;
}

}  // namespace

void rolling_rows_cuda(const RollingRowsParams& params, Stream stream) {
  if (params.num_sequences == 0) return;
  const size_t bytes = static_cast<size_t>(params.capacity) * sizeof(int);
  cuda::allow_shared(rolling_rows_kernel, static_cast<int64_t>(bytes), "rolling_rows");
  rolling_rows_kernel<<<static_cast<unsigned int>(params.num_sequences), kThreads, bytes, stream>>>(
      params);
  cuda::check_launch("rolling_rows");
}

}  // namespace elastic_cache
