// One block a sequence, kThreads positions at a time. The age from which positions are chosen is
// found bit by bit, from the highest bit of any age down: a bit stays set if enough positions are
// at least that old. Places in the list are ranks among flags, as in select_rows. The subtle thing:
// ages lie in shared memory meanwhile, -1 for positions that are computed anyway.
#include "elastic_cache/rolling_rows.h"

#include <climits>

#include "common/launch.h"
#include "common/reduce.cuh"

namespace elastic_cache {
namespace {

constexpr int kThreads = 1024;

struct Sequence {
  const bool* masked;
  const bool* committed;
  int64_t begin;
  int64_t end;
};

// Ages of the positions that may be chosen, one more than before; returns how many rows of the step
// are left for them.
__device__ int64_t read_ages(const RollingRowsParams& p, const Sequence& sequence,
                             const int* before, int64_t window, int* ages, int* shared) {
  int64_t num_waiting = 0, num_computed = 0;
  for (int64_t chunk = sequence.begin; chunk < sequence.end; chunk += kThreads) {
    const int64_t i = chunk + threadIdx.x;
    const bool is_committed = i < sequence.end && sequence.committed[i];
    const bool is_waiting = i < sequence.end && sequence.masked[i] && !is_committed;
    int in_chunk = 0;
    const int64_t rank = num_waiting + cuda::block_rank(is_waiting, shared, &in_chunk);
    num_waiting += in_chunk;
    const bool is_computed = is_committed || (is_waiting && rank < window);
    num_computed += __syncthreads_count(is_computed);
    if (i >= sequence.end) continue;
    const int age = before[i];
    ages[i] = is_computed ? -1 : age < INT_MAX ? age + 1 : age;
  }
  return p.num_rows[blockIdx.x] - num_computed;
}

__device__ int64_t count_from(const Sequence& sequence, const int* ages, int least) {
  int64_t count = 0;
  for (int64_t chunk = sequence.begin; chunk < sequence.end; chunk += kThreads) {
    const int64_t i = chunk + threadIdx.x;
    count += __syncthreads_count(i < sequence.end && ages[i] >= least);
  }
  return count;
}

// The greatest age such that at least `budget` positions have it or more (no age, if that is 0); 0
// if there are fewer positions.
__device__ int find_threshold(const Sequence& sequence, const int* ages, int64_t budget) {
  int threshold = 0;
  for (int bit = 1 << 30; bit > 0; bit >>= 1) {
    if (count_from(sequence, ages, threshold | bit) >= budget) threshold |= bit;
  }
  return threshold;
}

__global__ void __launch_bounds__(kThreads) rolling_rows_kernel(RollingRowsParams p) {
  extern __shared__ int ages[];  // [C]
  __shared__ int shared[kThreads / cuda::kWarpSize];
  const int64_t s = blockIdx.x, slot = s * p.capacity;
  const Sequence sequence{p.masked + slot, p.committed + slot, p.key_range[2 * s],
                          p.key_range[2 * s + 1]};
  int32_t* chosen = p.chosen + s * p.max_chosen;
  int64_t budget = read_ages(p, sequence, p.age + slot, p.window[s], ages, shared);
  budget = min(max(budget, int64_t{0}), p.max_chosen);
  const int threshold = find_threshold(sequence, ages, budget);
  // Of the positions exactly that old, the first ones.
  int64_t num_equal =
      threshold == INT_MAX ? budget : budget - count_from(sequence, ages, threshold + 1);
  int64_t num_chosen = 0;
  for (int64_t chunk = sequence.begin; chunk < sequence.end; chunk += kThreads) {
    const int64_t i = chunk + threadIdx.x;
    const int age = i < sequence.end ? ages[i] : -1;
    int in_chunk = 0;
    const int equal_rank = cuda::block_rank(age == threshold, shared, &in_chunk);
    const bool is_chosen = age > threshold || (age == threshold && equal_rank < num_equal);
    num_equal -= in_chunk;
    const int64_t rank = num_chosen + cuda::block_rank(is_chosen, shared, &in_chunk);
    num_chosen += in_chunk;
    if (is_chosen) chosen[rank] = static_cast<int32_t>(i);
    if (i < sequence.end) p.age[slot + i] = is_chosen || age < 0 ? 0 : age;
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
