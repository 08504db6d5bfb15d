// drift_statistics: Tensor -> params -> kernel.
#include "elastic_cache/drift_statistics.h"

#include "checks.h"
#include "launch.h"
#include "ops.h"

namespace elastic_cache::ops {
namespace {

// Rows between the layers of q_old, k_old and lse.
int64_t check_old(const Checks& check, const std::optional<Tensor>& q_old,
                  const std::optional<Tensor>& k_old, const std::optional<Tensor>& lse,
                  const DriftStatisticsParams& p) {
  int64_t num_rows = kAnySize;  // until one says
  const auto check_rows = [&](const char* name, const std::optional<Tensor>& x) {
    check.that(!x || x->size(1) >= p.num_rows, name, " must have a row for each of ", p.num_rows,
               " rows, got ", x ? x->size(1) : 0);
    if (x) num_rows = x->size(1);
  };
  const Dim layers{"layers", p.num_layers}, heads{"heads", p.num_heads};
  const Dim head_dim{"head_dim", p.head_dim};
  check.shape("q_old", q_old, {layers, {"rows", num_rows}, heads, head_dim});
  check_rows("q_old", q_old);
  check.shape("k_old", k_old, {layers, {"rows", num_rows}, {"kv_heads", p.num_kv_heads}, head_dim});
  check_rows("k_old", k_old);
  check.shape("lse", lse, {layers, {"rows", num_rows}, heads});
  check_rows("lse", lse);
  return num_rows == kAnySize ? p.num_rows : num_rows;
}

}  // namespace

void drift_statistics(const Tensor& q_cache, const Tensor& k_cache,
                      const std::optional<Tensor>& q_old, const std::optional<Tensor>& k_old,
                      const std::optional<Tensor>& lse, const Tensor& rows, const Tensor& segments,
                      const Tensor& key_range, double scale, const Tensor& mass,
                      const Tensor& similarity) {
  const Checks check("drift_statistics", {{"q_cache", q_cache, Type::kModel},
                                          {"k_cache", k_cache, Type::kModel},
                                          {"q_old", q_old, Type::kModel},
                                          {"k_old", k_old, Type::kModel},
                                          {"lse", lse, Type::kFloat32},
                                          {"rows", rows, Type::kInt32},
                                          {"segments", segments, Type::kInt32},
                                          {"key_range", key_range, Type::kInt32},
                                          {"mass", mass, Type::kFloat32},
                                          {"similarity", similarity, Type::kFloat64}});
  check.shape("q_cache", q_cache, {{"layers"}, {"slots"}, {"heads"}, {"head_dim"}});
  const int64_t layers = q_cache.size(0), slots = q_cache.size(1), head_dim = q_cache.size(3);
  check.shape("k_cache", k_cache,
              {{"layers", layers}, {"slots", slots}, {"kv_heads"}, {"head_dim", head_dim}});
  check.heads(q_cache.size(2), k_cache.size(2));
  check.shape("rows", rows, {{"rows"}});
  check.shape("segments", segments, {{"sequences"}, {"segment columns", kSegmentColumns}});
  const int64_t num_sequences = segments.size(0), capacity = check.capacity(slots, num_sequences);
  check.shape("key_range", key_range, {{"sequences", num_sequences}, {"2", 2}});
  check.shape("mass", mass,
              {{"layers", layers}, {"sequences", num_sequences}, {"capacity", capacity}});
  check.shape("similarity", similarity, {{"layers", layers}, {"sequences", num_sequences}});
  DriftStatisticsParams params{.dtype = check.dtype(),
                               .num_layers = layers,
                               .num_sequences = num_sequences,
                               .num_rows = rows.size(0),
                               .num_old_rows = 0,
                               .num_heads = q_cache.size(2),
                               .num_kv_heads = k_cache.size(2),
                               .head_dim = head_dim,
                               .capacity = capacity,
                               .scale = static_cast<float>(scale),
                               .q_cache = input<void>(q_cache),
                               .k_cache = input<void>(k_cache),
                               .q_old = input<void>(q_old),
                               .k_old = input<void>(k_old),
                               .lse = input<float>(lse),
                               .rows = input<int32_t>(rows),
                               .segments = input<int32_t>(segments),
                               .key_range = input<int32_t>(key_range),
                               .mass = output<float>(mass),
                               .similarity = output<double>(similarity)};
  params.num_old_rows = check_old(check, q_old, k_old, lse, params);
  check.indices("rows", rows, slots);
  check.key_range(key_range, capacity);
  check.segments(segments, params.num_rows, q_old && k_old);
  ELASTIC_CACHE_LAUNCH_WITH_WORKSPACE(drift_statistics, mass, params);
}

}  // namespace elastic_cache::ops
