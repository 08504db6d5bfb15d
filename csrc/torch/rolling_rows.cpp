// rolling_rows: Tensor -> params -> kernel.
#include "elastic_cache/rolling_rows.h"

#include "checks.h"
#include "launch.h"
#include "ops.h"

namespace elastic_cache::ops {

void rolling_rows(const Tensor& masked, const Tensor& committed, const Tensor& window,
                  const Tensor& num_rows, const Tensor& key_range, int64_t ahead, int64_t repeats,
                  int64_t reach, const Tensor& due, const Tensor& chosen) {
  const Checks check("rolling_rows", {{"masked", masked, Type::kBool},
                                      {"committed", committed, Type::kBool},
                                      {"window", window, Type::kInt32},
                                      {"num_rows", num_rows, Type::kInt32},
                                      {"key_range", key_range, Type::kInt32},
                                      {"due", due, Type::kInt32},
                                      {"chosen", chosen, Type::kInt32}});
  check.shape("masked", masked, {{"sequences"}, {"capacity"}});
  const Dim sequences{"sequences", masked.size(0)}, capacity{"capacity", masked.size(1)};
  check.shape("committed", committed, {sequences, capacity});
  check.shape("window", window, {sequences});
  check.shape("num_rows", num_rows, {sequences});
  check.shape("key_range", key_range, {sequences, {"2", 2}});
  check.shape("due", due, {sequences, capacity});
  check.shape("chosen", chosen, {sequences, {"max_chosen"}});

  check.that(ahead >= 0, "ahead must be at least 0, got ", ahead);
  check.that(0 <= repeats && repeats <= kMaxRepeats, "repeats must be between 0 and ", kMaxRepeats,
             ", got ", repeats);
  check.that(1 <= reach && reach <= kMaxReach, "reach must be between 1 and ", kMaxReach, ", got ",
             reach);

  const RollingRowsParams params{.num_sequences = sequences.size,
                                 .capacity = capacity.size,
                                 .max_chosen = chosen.size(1),
                                 .ahead = ahead,
                                 .repeats = repeats,
                                 .reach = reach,
                                 .masked = input<bool>(masked),
                                 .committed = input<bool>(committed),
                                 .window = input<int32_t>(window),
                                 .num_rows = input<int32_t>(num_rows),
                                 .key_range = input<int32_t>(key_range),
                                 .due = output<int32_t>(due),
                                 .chosen = output<int32_t>(chosen)};
  check.key_range(key_range, capacity.size);
#ifdef ELASTIC_CACHE_CUDA
  if (due.is_cuda()) {
    rolling_rows_cuda(params, CurrentStream(due));
    return;
  }
#endif
  rolling_rows_cpu(params);
}

}  // namespace elastic_cache::ops
