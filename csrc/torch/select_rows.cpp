// select_rows: Tensor -> params -> kernel.
#include "elastic_cache/select_rows.h"

#include "checks.h"
#include "launch.h"
#include "ops.h"

namespace elastic_cache::ops {

void select_rows(const Tensor& masked, const Tensor& committed, const Tensor& tracked,
                 const Tensor& window, const Tensor& lookahead, const Tensor& rows,
                 const Tensor& segments, const Tensor& window_rows) {
  const Checks check("select_rows", {{"masked", masked, Type::kBool},
                                     {"committed", committed, Type::kBool},
                                     {"tracked", tracked, Type::kInt32},
                                     {"window", window, Type::kInt32},
                                     {"lookahead", lookahead, Type::kInt32},
                                     {"rows", rows, Type::kInt32},
                                     {"segments", segments, Type::kInt32},
                                     {"window_rows", window_rows, Type::kInt32}});
  check.shape("masked", masked, {{"sequences"}, {"capacity"}});
  const int64_t num_sequences = masked.size(0), capacity = masked.size(1);
  check.shape("committed", committed, {{"sequences", num_sequences}, {"capacity", capacity}});
  check.shape("tracked", tracked, {{"layers"}, {"sequences", num_sequences}, {"track_num"}});
  check.shape("window", window, {{"sequences", num_sequences}});
  check.shape("lookahead", lookahead, {{"sequences", num_sequences}});
  check.shape("rows", rows, {{"max_rows"}});
  check.shape("segments", segments,
              {{"sequences", num_sequences}, {"segment columns", kSegmentColumns}});
  check.shape("window_rows", window_rows, {{"max_window"}});

  const SelectRowsParams params{.num_sequences = num_sequences,
                                .capacity = capacity,
                                .num_layers = tracked.size(0),
                                .track_num = tracked.size(2),
                                .max_rows = rows.size(0),
                                .max_window = window_rows.size(0),
                                .masked = input<bool>(masked),
                                .committed = input<bool>(committed),
                                .tracked = input<int32_t>(tracked),
                                .window = input<int32_t>(window),
                                .lookahead = input<int32_t>(lookahead),
                                .rows = output<int32_t>(rows),
                                .segments = output<int32_t>(segments),
                                .window_rows = output<int32_t>(window_rows)};
  check.indices("tracked", tracked, capacity);
#ifdef ELASTIC_CACHE_CUDA
  if (rows.is_cuda()) {
    select_rows_cuda(params, CurrentStream(rows));
    return;
  }
#endif
  check.that(select_rows_cpu(params), "rows and window_rows must hold all selected rows, but ",
             params.max_rows, " rows or ", params.max_window, " window rows are too few");
}

}  // namespace elastic_cache::ops
