// Which rows a step computes (ALGORITHM.md section 3): per sequence, in this order,
//   tracked    unique positions chosen by any layer in the previous step, ascending;
//   committed  positions committed in the previous step, ascending;
//   window     the leftmost `window` positions that are still masked;
//   lookahead  the next `lookahead` masked positions: computed, but not decoded.
// The subtle thing: the window is not a block. It slides with every commit and may have gaps.
// A position is listed once, under the first kind that claims it (and then takes no place in the
// window). A sequence whose window is empty is finished: it has no rows at all.
#pragma once

#include "elastic_cache/types.h"

namespace elastic_cache {

struct SelectRowsParams {
  int64_t num_sequences;  // S
  int64_t capacity;       // C
  int64_t num_layers;     // L
  int64_t track_num;      // k, width of `tracked`
  int64_t max_rows;       // length of `rows`
  int64_t max_window;     // length of `window_rows`

  const bool* masked;        // [S, C] still masked
  const bool* committed;     // [S, C] committed in the previous step
  const int32_t* tracked;    // [L, S, k] positions, -1 = none
  const int32_t* window;     // [S]
  const int32_t* lookahead;  // [S]

  int32_t* rows;         // [max_rows] out: slots, padded with -1
  int32_t* segments;     // [S, kSegmentColumns] out
  int32_t* window_rows;  // [max_window] out: indices into `rows` of the window rows, padded with -1
};

// Returns false when `rows` or `window_rows` is too short (their contents are then unspecified).
bool select_rows_cpu(const SelectRowsParams& params);
// The lists must be long enough: what does not fit is left out, as nobody looks at the device.
void select_rows_cuda(const SelectRowsParams& params, Stream stream);

}  // namespace elastic_cache
