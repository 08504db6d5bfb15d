// window_attention: Tensor -> params -> kernel.
#include "elastic_cache/window_attention.h"

#include "checks.h"
#include "launch.h"
#include "ops.h"

namespace elastic_cache::ops {

void window_attention(const Tensor& q_cache, const Tensor& k_cache, const Tensor& v_cache,
                      const Tensor& rows, const std::optional<Tensor>& segments,
                      const Tensor& key_range, double scale, const Tensor& out, const Tensor& lse) {
  const Checks check("window_attention", {{"q_cache", q_cache, Type::kModel},
                                          {"k_cache", k_cache, Type::kModel},
                                          {"v_cache", v_cache, Type::kModel},
                                          {"rows", rows, Type::kInt32},
                                          {"segments", segments, Type::kInt32},
                                          {"key_range", key_range, Type::kInt32},
                                          {"out", out, Type::kModel},
                                          {"lse", lse, Type::kFloat32}});
  const auto [slots, heads, kv_heads, head_dim] = check.caches(q_cache, k_cache, v_cache);
  check.heads(heads, kv_heads);
  check.shape("rows", rows, {{"rows"}});
  const int64_t num_rows = rows.size(0);
  check.shape("key_range", key_range, {{"sequences"}, {"2", 2}});
  const int64_t num_sequences = key_range.size(0), capacity = check.capacity(slots, num_sequences);
  check.shape("segments", segments,
              {{"sequences", num_sequences}, {"segment columns", kSegmentColumns}});
  check.shape("out", out, {{"rows", num_rows}, {"heads", heads}, {"head_dim", head_dim}});
  check.shape("lse", lse, {{"rows", num_rows}, {"heads", heads}});

  check.indices("rows", rows, slots);
  check.key_range(key_range, capacity);
  if (segments) {
    check.segments(*segments, num_rows, true);
    check.rows_of_segments(rows, *segments, capacity);
  }
  const WindowAttentionParams params{.dtype = check.dtype(),
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
                                     .rows = input<int32_t>(rows),
                                     .segments = input<int32_t>(segments),
                                     .key_range = input<int32_t>(key_range),
                                     .out = output<void>(out),
                                     .lse = output<float>(lse)};
  ELASTIC_CACHE_LAUNCH_WITH_WORKSPACE(window_attention, out, params);
}

}  // namespace elastic_cache::ops
