// rolling_rows: Tensor -> params -> kernel.
#include "elastic_cache/rolling_rows.h"

#include "checks.h"
#include "launch.h"
#include "ops.h"

namespace elastic_cache::ops {

void rolling_rows(const Tensor& masked, const Tensor& committed, const Tensor& window,
                  const Tensor& num_rows, const Tensor& key_range, const Tensor& age,
                  const Tensor& chosen) {
  const Checks check("rolling_rows", {{"masked", masked, Type::kBool},
                                      {"committed", committed, Type::kBool},
                                      {"window", window, Type::kInt32},
                                      {"num_rows", num_rows, Type::kInt32},
                                      {"key_range", key_range, Type::kInt32},
                                      {"age", age, Type::kInt32},
                                      {"chosen", chosen, Type::kInt32}});
  check.shape("masked", masked, {{"sequences"}, {"capacity"}});
  const Dim sequences{"sequences", masked.size(0)}, capacity{"capacity", masked.size(1)};
  check.shape("committed", committed, {sequences, capacity});
  check.shape("window", window, {sequences});
  check.shape("num_rows", num_rows, {sequences});
  check.shape("key_range", key_range, {sequences, {"2", 2}});
  check.shape("age", age, {sequences, capacity});
  check.shape("chosen", chosen, {sequences, {"max_chosen"}});

  const RollingRowsParams params{.num_sequences = sequences.size,
                                 .capacity = capacity.size,
                                 .max_chosen = chosen.size(1),
                                 .masked = input<bool>(masked),
                                 .committed = input<bool>(committed),
                                 .window = input<int32_t>(window),
                                 .num_rows = input<int32_t>(num_rows),
                                 .key_range = input<int32_t>(key_range),
                                 .age = output<int32_t>(age),
                                 .chosen = output<int32_t>(chosen)};
  check.key_range(key_range, capacity.size);
#ifdef ELASTIC_CACHE_CUDA
  if (age.is_cuda()) {
    rolling_rows_cuda(params, CurrentStream(age));
    return;
  }
#endif
  rolling_rows_cpu(params);
}

}  // namespace elastic_cache::ops
