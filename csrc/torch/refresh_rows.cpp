// refresh_rows: Tensor -> params -> kernel.
#include "elastic_cache/refresh_rows.h"

#include "checks.h"
#include "launch.h"
#include "ops.h"

namespace elastic_cache::ops {

void refresh_rows(const Tensor& first_full_layer, const Tensor& key_range, int64_t layer,
                  int64_t capacity, const Tensor& rows, const Tensor& offsets) {
  const Checks check("refresh_rows", {{"first_full_layer", first_full_layer, Type::kInt32},
                                      {"key_range", key_range, Type::kInt32},
                                      {"rows", rows, Type::kInt32},
                                      {"offsets", offsets, Type::kInt32}});
  check.shape("first_full_layer", first_full_layer, {{"sequences"}});
  const int64_t num_sequences = first_full_layer.size(0);
  check.shape("key_range", key_range, {{"sequences", num_sequences}, {"2", 2}});
  check.shape("rows", rows, {{"max_rows"}});
  check.shape("offsets", offsets, {{"sequences + 1", num_sequences + 1}});
  check.that(capacity >= 0, "capacity must be at least 0, got ", capacity);

  const RefreshRowsParams params{.num_sequences = num_sequences,
                                 .capacity = capacity,
                                 .max_rows = rows.size(0),
                                 .layer = layer,
                                 .first_full_layer = input<int32_t>(first_full_layer),
                                 .key_range = input<int32_t>(key_range),
                                 .rows = output<int32_t>(rows),
                                 .offsets = output<int32_t>(offsets)};
  check.key_range(key_range, capacity);
#ifdef ELASTIC_CACHE_CUDA
  if (rows.is_cuda()) {
    refresh_rows_cuda(params, CurrentStream(rows));
    return;
  }
#endif
  check.that(refresh_rows_cpu(params), "rows must hold all refreshed rows, but ", params.max_rows,
             " are too few");
}

}  // namespace elastic_cache::ops
