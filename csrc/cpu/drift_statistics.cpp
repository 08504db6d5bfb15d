// drift_attention without the attention, a layer after the other. Its one sweep over the keys finds
// the log-sum-exps as well, so p.lse is not read.
#include "elastic_cache/drift_statistics.h"

#include "common.h"
#include "elastic_cache/drift_attention.h"

namespace elastic_cache {

void drift_statistics_cpu(const DriftStatisticsParams& p) {
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t slots = p.num_sequences * p.capacity;
    for (int64_t layer = 0; layer < p.num_layers; ++layer) {
      const auto rows_of = [&](const void* x, int64_t rows, int64_t heads) -> const void* {
        return x ? static_cast<const T*>(x) + layer * rows * heads * p.head_dim : nullptr;
      };
      drift_attention_cpu({.dtype = p.dtype,
                           .num_sequences = p.num_sequences,
                           .num_rows = p.num_rows,
                           .num_heads = p.num_heads,
                           .num_kv_heads = p.num_kv_heads,
                           .head_dim = p.head_dim,
                           .capacity = p.capacity,
                           .scale = p.scale,
                           .q_cache = rows_of(p.q_cache, slots, p.num_heads),
                           .k_cache = rows_of(p.k_cache, slots, p.num_kv_heads),
                           .v_cache = nullptr,
                           .q_old = rows_of(p.q_old, p.num_old_rows, p.num_heads),
                           .k_old = rows_of(p.k_old, p.num_old_rows, p.num_kv_heads),
                           .rows = p.rows,
                           .segments = p.segments,
                           .key_range = p.key_range,
                           .out = nullptr,
                           .lse = nullptr,
                           .mass = p.mass + layer * slots,
                           .similarity = p.similarity + layer * p.num_sequences});
    }
  });
}

}  // namespace elastic_cache
