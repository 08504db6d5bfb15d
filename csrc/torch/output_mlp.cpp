// output_mlp: Tensor -> params -> kernel.
#include "elastic_cache/output_mlp.h"

#include "checks.h"
#include "layer_params.h"
#include "ops.h"

namespace elastic_cache::ops {

void output_mlp(const Tensor& attention, const Tensor& out_weight, const Tensor& residual,
                const Tensor& norm_weight, double eps, const Tensor& gate_up_weight,
                const Tensor& down_weight, const Tensor& hidden, const Tensor& gate_up,
                const Tensor& activation, const Tensor& delta, bool batch_invariant) {
  const Checks check("output_mlp",
                     {{"attention", attention, Type::kModel},
                      {"out_weight", out_weight, Type::kModel, Memory::kMatrix},
                      {"residual", residual, Type::kModel},
                      {"norm_weight", norm_weight, Type::kModel},
                      {"gate_up_weight", gate_up_weight, Type::kModel, Memory::kMatrix},
                      {"down_weight", down_weight, Type::kModel, Memory::kMatrix},
                      {"hidden", hidden, Type::kModel},
                      {"gate_up", gate_up, Type::kModel},
                      {"activation", activation, Type::kModel},
                      {"delta", delta, Type::kModel}});
  check.shape("residual", residual, {{"rows"}, {"width"}});
  const Dim rows{"rows", residual.size(0)}, width{"width", residual.size(1)};
  check.shape("activation", activation, {rows, {"ffn_width"}});
  const Dim ffn{"ffn_width", activation.size(1)}, both{"2 * ffn_width", 2 * ffn.size};
  check.shape("attention", attention, {rows, {"attention_width"}});
  check.shape("out_weight", out_weight, {{"attention_width", attention.size(1)}, width});
  check.shape("norm_weight", norm_weight, {width});
  check.shape("gate_up_weight", gate_up_weight, {width, both});
  check.shape("down_weight", down_weight, {ffn, width});
  check.shape("hidden", hidden, {rows, width});
  check.shape("gate_up", gate_up, {rows, both});
  check.shape("delta", delta, {rows, width});

  if (batch_invariant) {
    check_batch_invariant(check, {{attention, out_weight, delta},
                                  {hidden, gate_up_weight, gate_up},
                                  {activation, down_weight, delta}});
  }
  const DType dtype = check.dtype();
  if (!residual.is_cpu()) {  // products stand between the kernels
    layer_linear(dtype, attention, out_weight, std::nullopt, delta, batch_invariant);
    add_rms_norm(residual, delta, norm_weight, eps, hidden, std::nullopt, std::nullopt);
    layer_gated_linear(dtype, hidden, gate_up_weight, gate_up, activation, batch_invariant);
    layer_linear(dtype, activation, down_weight, std::nullopt, delta, batch_invariant);
    return;
  }
  output_mlp_cpu(
      {.output = linear_params(dtype, attention, out_weight, nullptr, delta),
       .norm = norm_params(dtype, residual, input<void>(delta), norm_weight, eps, hidden),
       .gate_up = linear_params(dtype, hidden, gate_up_weight, nullptr, gate_up),
       .swiglu = {.dtype = dtype,
                  .num_rows = rows.size,
                  .width = ffn.size,
                  .gate_up = input<void>(gate_up),
                  .out = output<void>(activation)},
       .down = linear_params(dtype, activation, down_weight, nullptr, delta)});
}

}  // namespace elastic_cache::ops
