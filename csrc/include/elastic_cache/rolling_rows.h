// Which cached positions a step of policy `rolling` computes anew: those computed longest ago.
//   budget  num_rows - positions just committed - the window (the leftmost `window` still masked)
//   chosen  of all other positions the `budget` of greatest age, ties to the lower position
//   age     0 of the chosen, committed and window positions, one more of all others
// The subtle thing: the step before this call has computed what the call before listed, so the age
// that an op call leaves is the number of steps, the coming one included, without the position.
#pragma once

#include "elastic_cache/types.h"

namespace elastic_cache {

struct RollingRowsParams {
  int64_t num_sequences;  // S
  int64_t capacity;       // C
  int64_t max_chosen;     // k, width of `chosen`, and the most a sequence gets

  const bool* masked;        // [S, C] still masked
  const bool* committed;     // [S, C] committed in the previous step
  const int32_t* window;     // [S]
  const int32_t* num_rows;   // [S] rows of the step in all
  const int32_t* key_range;  // [S, 2]; positions outside of it are not looked at

  int32_t* age;     // [S, C] in and out
  int32_t* chosen;  // [S, k] out: positions, ascending, padded with -1
};

void rolling_rows_cpu(const RollingRowsParams& params);
void rolling_rows_cuda(const RollingRowsParams& params, Stream stream);

}  // namespace elastic_cache
