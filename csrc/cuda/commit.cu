// A block owns a sequence. Each candidate's rank is counted against all others (W is at most a few
// hundred, so W^2 comparisons are less than a sort's barriers), and each rule accepts a candidate
// by its own confidence and rank alone: whatever it refuses, it refuses for every later rank too.
// The subtle thing: confidences are compared as doubles, as the CPU does, because a threshold must
// not depend on the device.
#include "elastic_cache/commit.h"

#include <climits>

#include "common/launch.h"
#include "common/reduce.cuh"

namespace elastic_cache {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / cuda::kWarpSize;

// The position of candidate i in sequence s if it may be committed, else -1.
__device__ int32_t position_of(const CommitParams& p, int64_t s, int64_t i) {
  const int32_t slot = p.candidates[i];
  const auto capacity =
      static_cast<int32_t>(p.capacity);  // slots are int32, and so is one sequence
  if (slot < 0 || slot / capacity != s || !p.masked[slot]) return -1;
  const int32_t position = slot % capacity;
  return position >= p.key_range[2 * s] && position < p.key_range[2 * s + 1] ? position : -1;
}

// Some of the candidates, where every thread reads them.
struct Tile {
  double confidence[kThreads];
  int32_t position[kThreads];
};

// How many candidates come before this one, and the best confidence of all.
struct Standing {
  int64_t rank;
  double best;
};

// Called by all threads of the block; a position of -1 asks for nothing.
__device__ Standing stand(const CommitParams& p, int64_t s, double confidence, int32_t position,
                          Tile& tile) {
  Standing standing{1, confidence};
  for (int64_t first = 0; first < p.num_candidates; first += kThreads) {
    const int64_t mine = first + threadIdx.x;
    __syncthreads();  // the tile before has been read
    tile.position[threadIdx.x] = mine < p.num_candidates ? position_of(p, s, mine) : -1;
    if (mine < p.num_candidates) tile.confidence[threadIdx.x] = p.confidence[mine];
    __syncthreads();
    const int count = static_cast<int>(min(p.num_candidates - first, int64_t{kThreads}));
    for (int i = 0; position >= 0 && i < count; ++i) {
      const int32_t other = tile.position[i];
      if (other < 0) continue;
      const double value = tile.confidence[i];
      standing.rank += value > confidence || (value == confidence && other < position);
      standing.best = value > standing.best ? value : standing.best;
    }
  }
  return standing;
}

__device__ bool is_accepted(CommitRule rule, double amount, double confidence,
                            const Standing& standing) {
  if (standing.rank == 1) return true;
  const auto rank = static_cast<double>(standing.rank);
  switch (rule) {
    case CommitRule::kThreshold:
      return confidence >= (amount < standing.best ? amount : standing.best);
    case CommitRule::kTopK: return rank <= amount;
    case CommitRule::kFactor: return confidence >= 1.0 - amount / (rank + 1.0);
  }
  return false;
}

// Marks the accepted candidates; masks change only afterwards, because every thread reads them.
__device__ void mark_accepted(const CommitParams& p, int64_t s, Tile& tile, int* first_eos) {
  const auto rule = static_cast<CommitRule>(p.rule[s]);
  for (int64_t first = 0; first < p.num_candidates; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    const int32_t position = i < p.num_candidates ? position_of(p, s, i) : -1;
    const double confidence = position >= 0 ? p.confidence[i] : 0.0;
    const Standing standing = stand(p, s, confidence, position, tile);
    if (position < 0 || !is_accepted(rule, p.amount[s], confidence, standing)) continue;
    p.tokens[s * p.capacity + position] = p.token[i];
    p.committed[s * p.capacity + position] = true;
    if (p.token[i] == p.eos_id) atomicMin(first_eos, static_cast<int>(position));
  }
}

// How many of `count` flags are set; in every thread.
__device__ int count_flags(const bool* flags, int64_t count, int* shared) {
  int set = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) set += flags[i];
  return cuda::block_sum(set, shared);
}

__global__ void __launch_bounds__(kThreads, 1) commit_kernel(CommitParams p) {
  __shared__ int shared[kWarps], first_eos;
  __shared__ Tile tile;
  const int64_t s = blockIdx.x, begin = p.key_range[2 * s], end = p.key_range[2 * s + 1];
  if (p.first_full_layer && p.first_full_layer[s] < p.num_layers) return;
  bool* masked = p.masked + s * p.capacity;
  bool* committed = p.committed + s * p.capacity;
  for (int64_t i = threadIdx.x; i < p.capacity; i += kThreads) committed[i] = false;
  if (threadIdx.x == 0) first_eos = INT_MAX;
  int not_finite = 0;
  for (int64_t i = threadIdx.x; i < p.num_candidates; i += kThreads) {
    not_finite += position_of(p, s, i) >= 0 && p.confidence[i] != p.confidence[i];
  }
  not_finite = cuda::block_sum(not_finite, shared);
  if (not_finite == 0) mark_accepted(p, s, tile, &first_eos);
  __syncthreads();

  const bool cuts = p.eos_id >= 0 && first_eos != INT_MAX && p.eos_position[s] < 0;
  for (int64_t i = threadIdx.x; i < p.capacity; i += kThreads) {
    if (committed[i] || (cuts && i > first_eos && i < end)) masked[i] = false;
  }
  __syncthreads();
  const int num_committed = count_flags(committed, p.capacity, shared);
  const int num_masked = begin < end ? count_flags(masked + begin, end - begin, shared) : 0;
  if (threadIdx.x != 0) return;
  if (cuts) p.eos_position[s] = first_eos;
  int32_t* status = p.status + s * kStatusColumns;
  status[kStatusCommitted] = num_committed;
  status[kStatusMasked] = num_masked;
  status[kStatusEosPosition] = p.eos_position[s];
  status[kStatusNotFinite] = not_finite;
}

}  // namespace

void commit_cuda(const CommitParams& params, Stream stream) {
  if (params.num_sequences == 0) return;
  commit_kernel<<<static_cast<unsigned int>(params.num_sequences), kThreads, 0, stream>>>(params);
  cuda::check_launch("commit");
}

}  // namespace elastic_cache
