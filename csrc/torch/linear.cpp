// linear: Tensor -> params -> kernel.
#include "elastic_cache/linear.h"

#include "checks.h"
#include "ops.h"

namespace elastic_cache::ops {

void linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
            const Tensor& out) {
  const Checks check("linear", {{"x", x, Type::kModel, Memory::kRows},
                                {"weight", weight, Type::kModel, Memory::kRows},
                                {"bias", bias, Type::kModel},
                                {"out", out, Type::kModel}});
  check.shape("x", x, {{"rows"}, {"in_features"}});
  const int64_t num_rows = x.size(0), in_features = x.size(1);
  check.shape("weight", weight, {{"in_features", in_features}, {"out_features"}});
  const int64_t out_features = weight.size(1);
  check.shape("bias", bias, {{"out_features", out_features}});
  check.shape("out", out, {{"rows", num_rows}, {"out_features", out_features}});

  linear_cpu({.dtype = check.dtype(),
              .num_rows = num_rows,
              .in_features = in_features,
              .out_features = out_features,
              .x_row_stride = x.stride(0),
              .weight_row_stride = weight.stride(0),
              .x = input<void>(x),
              .weight = input<void>(weight),
              .bias = input<void>(bias),
              .out = output<void>(out)});
}

}  // namespace elastic_cache::ops
