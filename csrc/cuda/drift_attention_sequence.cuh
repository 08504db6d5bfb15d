// What a block of drift_attention has to know about its sequence.
// The subtle thing: tracked rows are numbered through all sequences, and a sequence whose rows have
// no room in the workspace has none as far as the kernels are concerned.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/reduce.cuh"
#include "elastic_cache/drift_attention.h"

namespace elastic_cache::cuda::drift {

constexpr float kLog2E = 1.44269504088896340736f;

inline int64_t max_tracked(const DriftAttentionParams& p) {
  return p.max_tracked > 0 ? std::min(p.max_tracked, p.num_rows) : p.num_rows;
}

struct Sequence {
  int index;
  int begin;  // tracked rows: begin .. begin + num_tracked - 1
  int num_tracked;
  int window;  // window rows: window .. window + num_window - 1
  int num_window;
  int end;  // of all its rows
  int first_key;
  int end_key;
  int first_tracked;  // tracked rows of the sequences before
  bool fits;          // whether the workspace has room for the tracked rows

  __device__ Sequence(const DriftAttentionParams& p, int max_tracked, int s) : index(s) {
    const int32_t* segment = p.segments + s * kSegmentColumns;
    begin = segment[kSegmentBegin];
    num_tracked = segment[kSegmentTracked];
    window = begin + num_tracked + segment[kSegmentCommitted];
    num_window = segment[kSegmentWindow];
    end = window + num_window + segment[kSegmentLookahead];
    first_key = p.key_range[2 * s];
    end_key = max(p.key_range[2 * s + 1], first_key);
    int before = 0;
    for (int i = static_cast<int>(threadIdx.x) % kWarpSize; i < s; i += kWarpSize) {
      before += p.segments[i * kSegmentColumns + kSegmentTracked];
    }
    first_tracked = warp_reduce(before, Sum{});
    fits = first_tracked + num_tracked <= max_tracked;
    if (!fits) num_tracked = 0;
  }
  // Lanes of the cache as it is now: window rows, then tracked rows.
  __device__ int num_lanes() const { return num_window + num_tracked; }
  __device__ int row_of(int lane) const {
    return lane < num_window ? window + lane : begin + lane - num_window;
  }
  __device__ bool has_key(int position) const {
    return position >= first_key && position < end_key;
  }
};

}  // namespace elastic_cache::cuda::drift
