// drift_attention: Tensor -> params -> kernel.
#include "elastic_cache/drift_attention.h"

#include "checks.h"
#include "launch.h"
#include "ops.h"

namespace elastic_cache::ops {

void drift_attention(const Tensor& q_cache, const Tensor& k_cache, const Tensor& v_cache,
                     const std::optional<Tensor>& q_old, const std::optional<Tensor>& k_old,
                     const Tensor& rows, const Tensor& segments, const Tensor& key_range,
                     double scale, const Tensor& out, const Tensor& lse, const Tensor& mass,
                     const Tensor& similarity) {
  const Checks check("drift_attention", {{"q_cache", q_cache, Type::kModel},
                                         {"k_cache", k_cache, Type::kModel},
                                         {"v_cache", v_cache, Type::kModel},
                                         {"q_old", q_old, Type::kModel},
                                         {"k_old", k_old, Type::kModel},
                                         {"rows", rows, Type::kInt32},
                                         {"segments", segments, Type::kInt32},
                                         {"key_range", key_range, Type::kInt32},
                                         {"out", out, Type::kModel},
                                         {"lse", lse, Type::kFloat32},
                                         {"mass", mass, Type::kFloat32},
                                         {"similarity", similarity, Type::kFloat64}});
  const auto [slots, heads, kv_heads, head_dim] = check.caches(q_cache, k_cache, v_cache);
  check.heads(heads, kv_heads);
  check.shape("rows", rows, {{"rows"}});
  const int64_t num_rows = rows.size(0);
  check.shape("q_old", q_old, {{"rows", num_rows}, {"heads", heads}, {"head_dim", head_dim}});
  check.shape("k_old", k_old, {{"rows", num_rows}, {"kv_heads", kv_heads}, {"head_dim", head_dim}});
  check.shape("segments", segments, {{"sequences"}, {"segment columns", kSegmentColumns}});
  const int64_t num_sequences = segments.size(0);
  check.shape("key_range", key_range, {{"sequences", num_sequences}, {"2", 2}});
  const int64_t capacity = check.capacity(slots, num_sequences);
  check.shape("out", out, {{"rows", num_rows}, {"heads", heads}, {"head_dim", head_dim}});
  check.shape("lse", lse, {{"rows", num_rows}, {"heads", heads}});
  check.shape("mass", mass, {{"sequences", num_sequences}, {"capacity", capacity}});
  check.shape("similarity", similarity, {{"sequences", num_sequences}});

  check.indices("rows", rows, slots);
  check.key_range(key_range, capacity);
  check.segments(segments, num_rows, q_old && k_old);
  check.rows_of_segments(rows, segments, capacity);
  const DriftAttentionParams params{.dtype = check.dtype(),
                                    .num_sequences = num_sequences,
                                    .num_rows = num_rows,
                                    .num_heads = heads,
                                    .num_kv_heads = kv_heads,
                                    .head_dim = head_dim,
                                    .capacity = capacity,
                                    .scale = static_cast<float>(scale),
                                    .q_cache = input<void>(q_cache),
                                    .k_cache = input<void>(k_cache),
                                    .v_cache = input<void>(v_cache),
                                    .q_old = input<void>(q_old),
                                    .k_old = input<void>(k_old),
                                    .rows = input<int32_t>(rows),
                                    .segments = input<int32_t>(segments),
                                    .key_range = input<int32_t>(key_range),
                                    .out = output<void>(out),
                                    .lse = output<float>(lse),
                                    .mass = output<float>(mass),
                                    .similarity = output<double>(similarity)};
  ELASTIC_CACHE_LAUNCH_WITH_WORKSPACE(drift_attention, out, params);
}

}  // namespace elastic_cache::ops
