// Attention by clusters of thread blocks, on devices of compute capability 9.0: what the launchers
// of window_attention and drift_attention need of cluster_attention.cu.
#pragma once

#include <cstdint>

#include "elastic_cache/drift_attention.h"
#include "elastic_cache/window_attention.h"

namespace elastic_cache::cuda::cluster {

// What the clusters leave for the comparison. Keys are counted from the first of the range, tracked
// rows through all sequences.
struct Workspace {
  double* cosines;         // [max_tracked, key blocks] sums over keys
  float* recent;           // [max_tracked, H, stride] new probabilities
  float* old;              // [max_tracked, H, stride] old ones
  float* mass;             // [Hkv, S, stride]
  unsigned int* finished;  // [S] blocks of the comparison
  int max_tracked;
  int num_key_blocks;
  int stride;  // capacity, rounded up so that pairs of keys are aligned
};

// Lays the arrays out from `memory` on; returns the bytes they take.
int64_t lay_out(const DriftAttentionParams& p, void* memory, Workspace* w);

// Whether the current device does attention of these sizes in clusters. The rows have no say in it:
// a row's result must not depend on how many there are.
bool takes(const WindowAttentionParams& p);

// out and lse.
void attend(const WindowAttentionParams& p, Stream stream);

// The same, in the same bits, and the workspace; up to kClusterRows rows.
void attend(const DriftAttentionParams& p, const Workspace& w, Stream stream);

}  // namespace elastic_cache::cuda::cluster
