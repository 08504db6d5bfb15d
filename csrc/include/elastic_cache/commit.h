// Commits candidates by confidence, applies the EOS rule, and reports to the host (ALGORITHM.md 4).
// Candidates that are -1 or no longer masked are ignored. Per sequence, with candidates ordered by
// confidence (ties: the lower position): see CommitRule. If any candidate of a sequence has a NaN
// confidence, nothing of that sequence is committed and status says so.
// EOS (eos_id >= 0): the first time EOS is among the newly committed tokens of a sequence, every
// masked position to the right of the leftmost one is dropped: no longer masked, token unchanged.
// `committed` is overwritten: exactly the positions committed by this call are true.
// Sequences that a drift test stopped (first_full_layer[s] < num_layers) are left as they are:
// their hidden rows are wrong until the layers behind have been recomputed.
#pragma once

#include "elastic_cache/types.h"

namespace elastic_cache {

struct CommitParams {
  int64_t num_sequences;   // S
  int64_t capacity;        // C
  int64_t num_candidates;  // W
  int64_t eos_id;          // -1: no EOS rule
  int64_t num_layers;      // L

  const int64_t* token;             // [W]
  const double* confidence;         // [W]
  const int32_t* candidates;        // [W] slots, -1 = skip
  const int32_t* rule;              // [S] CommitRule
  const double* amount;             // [S] eps, k or factor
  const int32_t* key_range;         // [S, 2] positions outside of it are never touched
  const int32_t* first_full_layer;  // [S], or null: every sequence commits

  int64_t* tokens;        // [S, C] in and out
  bool* masked;           // [S, C] in and out
  bool* committed;        // [S, C] out
  int32_t* eos_position;  // [S] in and out, -1 before the tail was cut
  int32_t* status;        // [S, kStatusColumns] out
};

void commit_cpu(const CommitParams& params);
void commit_cuda(const CommitParams& params, Stream stream);

}  // namespace elastic_cache
