// The policy's decision as data, so that no host has to look at it (ALGORITHM.md 4.5, 4.6), for
// `num_layers` consecutive layers, the first of which is `layer`:
//   first_full_layer[s] = l + 1   for the first layer l with similarity[l][s] < gamma[s], unless an
//                                 earlier layer has failed: first_full_layer[s] <= l + 1;
//   tracked[l][s] = the k positions of largest mass among the key range that are not masked
//                   (ties: the lower position; fewer than k eligible: padded with -1).
#pragma once

#include "elastic_cache/types.h"

namespace elastic_cache {

struct DriftDecisionParams {
  int64_t num_sequences;  // S
  int64_t capacity;       // C
  int64_t track_num;      // k
  int64_t num_layers;     // n
  int64_t layer;

  const double* similarity;  // [n, S]
  const double* gamma;       // [S]
  const float* mass;         // [n, S, C]
  const bool* masked;        // [S, C] before this step's commit
  const int32_t* key_range;  // [S, 2]

  int32_t* first_full_layer;  // [S] in and out
  int32_t* tracked;           // [n, S, k] out: positions, best first
};

void drift_decision_cpu(const DriftDecisionParams& params);
void drift_decision_cuda(const DriftDecisionParams& params, Stream stream);

}  // namespace elastic_cache
