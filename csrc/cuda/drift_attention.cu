// window_attention, then drift_statistics of the one layer, in the same workspace.
#include "elastic_cache/drift_attention.h"

#include <algorithm>

#include "elastic_cache/drift_statistics.h"
#include "elastic_cache/window_attention.h"

namespace elastic_cache {
namespace {

WindowAttentionParams attention_of(const DriftAttentionParams& p) {
  return {.dtype = p.dtype,
          .num_sequences = p.num_sequences,
          .num_rows = p.num_rows,
          .num_heads = p.num_heads,
          .num_kv_heads = p.num_kv_heads,
          .head_dim = p.head_dim,
          .capacity = p.capacity,
          .scale = p.scale,
          .q_cache = p.q_cache,
          .k_cache = p.k_cache,
          .v_cache = p.v_cache,
          .rows = p.rows,
          .segments = p.segments,
          .key_range = p.key_range,
          .out = p.out,
          .lse = p.lse,
          .workspace = p.workspace};
}

DriftStatisticsParams statistics_of(const DriftAttentionParams& p) {
  return {.dtype = p.dtype,
          .num_layers = 1,
          .num_sequences = p.num_sequences,
          .num_rows = p.num_rows,
          .num_old_rows = p.num_rows,
          .num_heads = p.num_heads,
          .num_kv_heads = p.num_kv_heads,
          .head_dim = p.head_dim,
          .capacity = p.capacity,
          .scale = p.scale,
          .q_cache = p.q_cache,
          .k_cache = p.k_cache,
          .q_old = p.q_old,
          .k_old = p.k_old,
          .lse = p.lse,
          .rows = p.rows,
          .segments = p.segments,
          .key_range = p.key_range,
          .mass = p.mass,
          .similarity = p.similarity,
          .workspace = p.workspace};
}

}  // namespace

int64_t drift_attention_workspace(const DriftAttentionParams& params) {
  return std::max(window_attention_workspace(attention_of(params)),
                  drift_statistics_workspace(statistics_of(params)));
}

void drift_attention_cuda(const DriftAttentionParams& params, Stream stream) {
  window_attention_cuda(attention_of(params), stream);
  drift_statistics_cuda(statistics_of(params), stream);
}

}  // namespace elastic_cache
