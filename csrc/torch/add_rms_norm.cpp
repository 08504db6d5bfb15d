// add_rms_norm: Tensor -> params -> kernel.
#include "elastic_cache/add_rms_norm.h"

#include "checks.h"
#include "launch.h"
#include "layer_params.h"
#include "ops.h"

namespace elastic_cache::ops {

void add_rms_norm(const Tensor& residual, const std::optional<Tensor>& delta, const Tensor& weight,
                  double eps, const Tensor& out, const std::optional<Tensor>& rows,
                  const std::optional<Tensor>& x_cache) {
  const Checks check("add_rms_norm", {{"residual", residual, Type::kModel},
                                      {"delta", delta, Type::kModel},
                                      {"weight", weight, Type::kModel},
                                      {"out", out, Type::kModel},
                                      {"rows", rows, Type::kInt32},
                                      {"x_cache", x_cache, Type::kModel}});
  check.shape("residual", residual, {{"rows"}, {"width"}});
  const int64_t num_rows = residual.size(0), width = residual.size(1);
  check.shape("delta", delta, {{"rows", num_rows}, {"width", width}});
  check.shape("weight", weight, {{"width", width}});
  check.shape("out", out, {{"rows", num_rows}, {"width", width}});
  check.shape("rows", rows, {{"rows", num_rows}});
  check.shape("x_cache", x_cache, {{"slots"}, {"width", width}});
  check.that(rows.has_value() == x_cache.has_value(),
             "rows and x_cache must be given together, got only ", rows ? "rows" : "x_cache");

  if (rows) check.indices("rows", *rows, x_cache->size(0));
  ELASTIC_CACHE_LAUNCH(add_rms_norm, residual,
                       norm_params(check.dtype(), residual, input<void>(delta), weight, eps, out,
                                   input<int32_t>(rows), output<void>(x_cache)));
}

}  // namespace elastic_cache::ops
