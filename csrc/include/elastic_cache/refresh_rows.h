// Depth-selective recompute: which rows run in full mode at a layer. A sequence whose drift test
// failed at layer l has first_full_layer = l + 1; at every layer >= that one all its positions
// are rows. Other sequences contribute nothing.
#pragma once

#include "elastic_cache/types.h"

namespace elastic_cache {

struct RefreshRowsParams {
  int64_t num_sequences;  // S
  int64_t capacity;       // C
  int64_t max_rows;       // length of `rows`
  int64_t layer;

  const int32_t* first_full_layer;  // [S]
  const int32_t* key_range;         // [S, 2] first and one-past-last position of the sequence

  int32_t* rows;     // [max_rows] out: slots, padded with -1
  int32_t* offsets;  // [S + 1] out: sequence s owns rows offsets[s] .. offsets[s + 1] - 1
};

// Returns false when `rows` is too short.
bool refresh_rows_cpu(const RefreshRowsParams& params);
// The lists must be long enough: what does not fit is left out, as nobody looks at the device.
void refresh_rows_cuda(const RefreshRowsParams& params, Stream stream);

}  // namespace elastic_cache
