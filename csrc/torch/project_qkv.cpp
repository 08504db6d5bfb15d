// project_qkv: Tensor -> params -> kernel.
#include "elastic_cache/project_qkv.h"

#include "checks.h"
#include "layer_params.h"
#include "ops.h"

namespace elastic_cache::ops {

void project_qkv(const Tensor& residual, const std::optional<Tensor>& delta,
                 const Tensor& norm_weight, double eps, const Tensor& weight,
                 const std::optional<Tensor>& bias, const Tensor& rows, const Tensor& rope,
                 int64_t capacity, const std::optional<Tensor>& segments,
                 const std::optional<Tensor>& x_cache, const Tensor& q_cache, const Tensor& k_cache,
                 const Tensor& v_cache, const std::optional<Tensor>& q_old,
                 const std::optional<Tensor>& k_old, const Tensor& hidden, const Tensor& qkv,
                 bool batch_invariant) {
  const Checks check("project_qkv", {{"residual", residual, Type::kModel},
                                     {"delta", delta, Type::kModel},
                                     {"norm_weight", norm_weight, Type::kModel},
                                     {"weight", weight, Type::kModel, Memory::kMatrix},
                                     {"bias", bias, Type::kModel},
                                     {"rows", rows, Type::kInt32},
                                     {"rope", rope, Type::kFloat32},
                                     {"segments", segments, Type::kInt32},
                                     {"x_cache", x_cache, Type::kModel},
                                     {"q_cache", q_cache, Type::kModel},
                                     {"k_cache", k_cache, Type::kModel},
                                     {"v_cache", v_cache, Type::kModel},
                                     {"q_old", q_old, Type::kModel},
                                     {"k_old", k_old, Type::kModel},
                                     {"hidden", hidden, Type::kModel},
                                     {"qkv", qkv, Type::kModel}});
  check.shape("residual", residual, {{"rows"}, {"width"}});
  const Dim row_count{"rows", residual.size(0)}, width{"width", residual.size(1)};
  check.shape("delta", delta, {row_count, width});
  check.shape("norm_weight", norm_weight, {width});
  const CacheShape cache = check.caches(q_cache, k_cache, v_cache);
  const Dim slots{"slots", cache.slots}, heads{"heads", cache.heads};
  const Dim kv_heads{"kv_heads", cache.kv_heads}, head_dim{"head_dim", cache.head_dim};
  check.shape("x_cache", x_cache, {slots, width});
  const Dim qkv_width{"(heads + 2 * kv_heads) * head_dim",
                      (heads.size + 2 * kv_heads.size) * head_dim.size};
  check.shape("weight", weight, {width, qkv_width});
  check.shape("bias", bias, {qkv_width});
  check.shape("rows", rows, {row_count});
  check.shape("rope", rope, {{"positions"}, head_dim});
  check.shape("q_old", q_old, {row_count, heads, head_dim});
  check.shape("k_old", k_old, {row_count, kv_heads, head_dim});
  check.shape("hidden", hidden, {row_count, width});
  check.shape("qkv", qkv, {row_count, qkv_width});
  check.rope(head_dim.size, slots.size, capacity, rope.size(0));
  check.shape("segments", segments, {{"sequences"}, {"segment columns", kSegmentColumns}});

  if (batch_invariant) check_batch_invariant(check, {{hidden, weight, qkv}});
  if (!residual.is_cpu()) {  // a product stands between two kernels
    add_rms_norm(residual, delta, norm_weight, eps, hidden,
                 x_cache ? std::optional<Tensor>(rows) : std::nullopt, x_cache);
    layer_linear(check.dtype(), hidden, weight, bias, qkv, batch_invariant);
    cache_write(qkv, rows, rope, capacity, segments, q_cache, k_cache, v_cache, q_old, k_old);
    return;
  }
  check.indices("rows", rows, slots.size);
  if (segments) check.segments(*segments, row_count.size, true);
  const DType dtype = check.dtype();
  project_qkv_cpu({.norm = norm_params(dtype, residual, input<void>(delta), norm_weight, eps,
                                       hidden, input<int32_t>(rows), output<void>(x_cache)),
                   .linear = linear_params(dtype, hidden, weight, input<void>(bias), qkv),
                   .write = cache_write_params(dtype, qkv, rows, rope, capacity, segments, q_cache,
                                               k_cache, v_cache, q_old, k_old)});
}

}  // namespace elastic_cache::ops
