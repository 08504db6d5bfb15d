// Which cached positions a step of policy `rolling` computes anew: those most due.
//   first   the leftmost position that waits (still masked, not just committed), else the range's
//   end due     of every position grows by kDueUnit * reach / (reach + |position - first|), rounded
//   down;
//           of the `ahead` waiting positions behind the window it is kUrgent at least
//   budget  num_rows - positions just committed - the window (the leftmost `window` that wait)
//   chosen  of all other positions the `budget` most due, ties to the lower position
//   after   due is 0 of window and chosen positions, but what is urgent counts down: a position
//   just
//           committed has `repeats` times kUrgent, and being chosen takes one kUrgent from it
// The subtle thing: the coming step counts as done, so it is the call after a step that says what
// its positions are due then.
#pragma once

#include "elastic_cache/types.h"

namespace elastic_cache {

inline constexpr int32_t kDueUnit = 1024;
inline constexpr int32_t kUrgent = 1
                                   << 20;  // what a position next to `first` reaches in 1024 steps
inline constexpr int64_t kMaxRepeats = 1024;
inline constexpr int64_t kMaxReach = 1 << 20;

struct RollingRowsParams {
  int64_t num_sequences;  // S
  int64_t capacity;       // C
  int64_t max_chosen;     // k, width of `chosen`, and the most a sequence gets
  int64_t ahead;          // >= 0
  int64_t repeats;        // 0 .. kMaxRepeats
  int64_t reach;          // 1 .. kMaxReach: at this distance from `first` due grows half as fast

  const bool* masked;        // [S, C] still masked
  const bool* committed;     // [S, C] committed in the previous step
  const int32_t* window;     // [S]
  const int32_t* num_rows;   // [S] rows of the step in all
  const int32_t* key_range;  // [S, 2]; positions outside of it are not looked at

  int32_t* due;     // [S, C] in and out, at least 0
  int32_t* chosen;  // [S, k] out: positions, ascending, padded with -1
};

void rolling_rows_cpu(const RollingRowsParams& params);
void rolling_rows_cuda(const RollingRowsParams& params, Stream stream);

}  // namespace elastic_cache
