// cache_write: Tensor -> params -> kernel.
#include "elastic_cache/cache_write.h"

#include "checks.h"
#include "launch.h"
#include "layer_params.h"
#include "ops.h"

namespace elastic_cache::ops {

void cache_write(const Tensor& qkv, const Tensor& rows, const Tensor& rope, int64_t capacity,
                 const std::optional<Tensor>& segments, const Tensor& q_cache,
                 const Tensor& k_cache, const Tensor& v_cache, const std::optional<Tensor>& q_old,
                 const std::optional<Tensor>& k_old) {
  const Checks check("cache_write", {{"qkv", qkv, Type::kModel, Memory::kRows},
                                     {"rows", rows, Type::kInt32},
                                     {"rope", rope, Type::kFloat32},
                                     {"segments", segments, Type::kInt32},
                                     {"q_cache", q_cache, Type::kModel},
                                     {"k_cache", k_cache, Type::kModel},
                                     {"v_cache", v_cache, Type::kModel},
                                     {"q_old", q_old, Type::kModel},
                                     {"k_old", k_old, Type::kModel}});
  const auto [slots, heads, kv_heads, head_dim] = check.caches(q_cache, k_cache, v_cache);
  check.shape("rows", rows, {{"rows"}});
  const int64_t num_rows = rows.size(0);
  check.shape("qkv", qkv,
              {{"rows", num_rows},
               {"(heads + 2 * kv_heads) * head_dim", (heads + 2 * kv_heads) * head_dim}});
  check.shape("rope", rope, {{"positions"}, {"head_dim", head_dim}});
  check.shape("q_old", q_old, {{"rows", num_rows}, {"heads", heads}, {"head_dim", head_dim}});
  check.shape("k_old", k_old, {{"rows", num_rows}, {"kv_heads", kv_heads}, {"head_dim", head_dim}});
  check.rope(head_dim, slots, capacity, rope.size(0));
  check.shape("segments", segments, {{"sequences"}, {"segment columns", kSegmentColumns}});

  check.indices("rows", rows, slots);
  if (segments) check.segments(*segments, num_rows, true);
  ELASTIC_CACHE_LAUNCH(cache_write, q_cache,
                       cache_write_params(check.dtype(), qkv, rows, rope, capacity, segments,
                                          q_cache, k_cache, v_cache, q_old, k_old));
}

}  // namespace elastic_cache::ops
