// Types shared by every operator of the public C++ API. Torch-free: raw pointers, sizes, strides.
//
// Vocabulary, used by all headers:
//   S sequences, each owning `capacity` consecutive slots; N = S * capacity slots in all;
//   slot = sequence * capacity + position; a row is one token computed in this step, R rows;
//   H query heads, Hkv key/value heads (H % Hkv == 0), D head_dim, L layers, C = capacity.
// A row list may be padded: a row whose slot is -1 is skipped, and outputs of a skipped row are
// zero. That is what lets one captured CUDA graph serve every step of a row bucket.
#pragma once

#include <cstdint>

struct CUstream_st;  // what cudaStream_t points to

namespace elastic_cache {

using Stream = ::CUstream_st*;  // cudaStream_t, without a CUDA header

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1 };

// Columns of `segments` [S, kSegmentColumns] int32: where a sequence's rows start in the row list,
// and how many of each kind follow, in this order.
enum SegmentColumn : int32_t {
  kSegmentBegin = 0,
  kSegmentTracked = 1,
  kSegmentCommitted = 2,
  kSegmentWindow = 3,
  kSegmentLookahead = 4,
  kSegmentColumns = 5,
};

// Columns of `status` [S, kStatusColumns] int32, what a commit reports to the host.
enum StatusColumn : int32_t {
  kStatusCommitted = 0,    // positions committed by this call
  kStatusMasked = 1,       // positions of the key range still masked afterwards
  kStatusEosPosition = 2,  // position of the EOS that cut the tail, -1 before that happens
  kStatusNotFinite = 3,    // candidates whose confidence was NaN; nothing is committed if > 0
  kStatusColumns = 4,
};

enum class CommitRule : int32_t {
  kThreshold = 0,  // amount = eps: all with confidence >= min(eps, best)
  kTopK = 1,       // amount = k: the k best (at least one)
  kFactor = 2,     // amount = f: r-th best while confidence >= 1 - f / (r + 1); the best always
};

}  // namespace elastic_cache
