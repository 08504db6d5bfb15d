// linear: Tensor -> params -> kernel; on a GPU the vendor's product, through torch.
#include "elastic_cache/linear.h"

#include <torch/csrc/stable/ops.h>

#include <array>

#include "checks.h"
#include "layer_params.h"
#include "ops.h"

namespace elastic_cache::ops {
namespace {

// out = x W + bias by torch's own kernels (cuBLASLt): at 16 to 128 rows they stream the weights at
// 85 % of what the memory gives, and a first kernel of ours lost (docs/performance.md).
void vendor_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   const Tensor& out) {
  using torch::stable::detail::from;
  // aten::linear takes [out, in] and transposes it itself.
  std::array<StableIValue, 4> stack{from(x), from(torch::stable::transpose(weight, 0, 1)),
                                    from(bias), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // owns the returned handle
}

}  // namespace

void linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
            const Tensor& out) {
  const Checks check("linear", {{"x", x, Type::kModel, Memory::kRows},
                                {"weight", weight, Type::kModel, Memory::kMatrix},
                                {"bias", bias, Type::kModel},
                                {"out", out, Type::kModel}});
  check.shape("x", x, {{"rows"}, {"in_features"}});
  const int64_t num_rows = x.size(0), in_features = x.size(1);
  check.shape("weight", weight, {{"in_features", in_features}, {"out_features"}});
  const int64_t out_features = weight.size(1);
  check.shape("bias", bias, {{"out_features", out_features}});
  check.shape("out", out, {{"rows", num_rows}, {"out_features", out_features}});

  if (!out.is_cpu()) return vendor_linear(x, weight, bias, out);
  linear_cpu(linear_params(check.dtype(), x, weight, input<void>(bias), out));
}

}  // namespace elastic_cache::ops
