// swiglu: Tensor -> params -> kernel.
#include "elastic_cache/swiglu.h"

#include "checks.h"
#include "launch.h"
#include "ops.h"

namespace elastic_cache::ops {

void swiglu(const Tensor& gate_up, const Tensor& out) {
  const Checks check("swiglu", {{"gate_up", gate_up, Type::kModel}, {"out", out, Type::kModel}});
  check.shape("out", out, {{"rows"}, {"width"}});
  const int64_t num_rows = out.size(0), width = out.size(1);
  check.shape("gate_up", gate_up, {{"rows", num_rows}, {"2 * width", 2 * width}});

  ELASTIC_CACHE_LAUNCH(swiglu, out,
                       {.dtype = check.dtype(),
                        .num_rows = num_rows,
                        .width = width,
                        .gate_up = input<void>(gate_up),
                        .out = output<void>(out)});
}

}  // namespace elastic_cache::ops
