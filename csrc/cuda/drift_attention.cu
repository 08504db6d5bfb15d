// window_attention, then column mass of the window rows and the cosine over heads, old against new.
//
// The part kernel of attention keeps the scores that the statistics need
// (attention_tensor_cores.cuh), its combining kernel gives the log-sum-exps, and a statistics
// kernel turns scores into weights (drift_statistics.cuh): three kernels, and K is read once.
#include "elastic_cache/drift_attention.h"

#include <algorithm>

#include "attention_launch.cuh"
#include "drift_statistics.cuh"
#include "elastic_cache/window_attention.h"

namespace elastic_cache {
namespace {

using cuda::attention::DriftParts;

WindowAttentionParams attention_of(const DriftAttentionParams& p, void* workspace) {
  return {.dtype = p.dtype,
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
          .key_range = p.key_range,
          .out = p.out,
          .lse = p.lse,
          .workspace = workspace};
}

// The arrays of a workspace, the parts of the attention first.
struct Layout {
  DriftParts drift;
  double* cosines;  // [max_tracked, key blocks] sums over keys
  float* masses;    // [kMassParts, S, C] sums over some of the heads
  int64_t num_key_blocks;
  int64_t num_bytes;
};

// Lays the arrays out from `memory` on, widest elements first.
Layout lay_out(const DriftAttentionParams& p, void* memory) {
  const int64_t tracked = p.max_tracked >= 0 ? std::min(p.max_tracked, p.num_rows) : p.num_rows;
  Layout layout{};
  layout.num_key_blocks =
      std::max<int64_t>((p.capacity + cuda::drift::kBlockKeys - 1) / cuda::drift::kBlockKeys, 1);
  auto* at = static_cast<unsigned char*>(memory);
  int64_t bytes = (window_attention_workspace(attention_of(p, nullptr)) + 15) / 16 * 16;
  const auto take = [&]<class T>(T*& array, int64_t count) {
    array = reinterpret_cast<T*>(at + bytes);
    bytes += count * static_cast<int64_t>(sizeof(T));
  };
  DriftParts& drift = layout.drift;
  take(layout.cosines, tracked * layout.num_key_blocks);
  take(drift.scores, p.num_rows * p.num_heads * p.capacity);
  take(drift.old_scores, tracked * p.num_heads * p.capacity);
  take(drift.old_lse, tracked * p.num_heads);
  take(layout.masses, cuda::drift::kMassParts * p.num_sequences * p.capacity);
  take(drift.finished, p.num_sequences);
  drift.q_old = p.q_old;
  drift.k_old = p.k_old;
  drift.segments = p.segments;
  drift.num_sequences = static_cast<int>(p.num_sequences);
  drift.max_tracked = static_cast<int>(tracked);
  layout.num_bytes = bytes;
  return layout;
}

}  // namespace

int64_t drift_attention_workspace(const DriftAttentionParams& params) {
  return lay_out(params, nullptr).num_bytes;
}

void drift_attention_cuda(const DriftAttentionParams& params, Stream stream) {
  if (params.num_sequences == 0 || params.num_heads == 0) return;
  const Layout layout = lay_out(params, params.workspace);
  cuda::attention::launch<true>(attention_of(params, params.workspace), layout.drift, stream);
  const int64_t rows = std::clamp<int64_t>(layout.drift.max_tracked, 1, cuda::kDriftRowBlocks);
  const dim3 grid(static_cast<unsigned int>(layout.num_key_blocks),
                  static_cast<unsigned int>(rows + cuda::drift::kMassParts),
                  static_cast<unsigned int>(params.num_sequences));
  cuda::launch_overlapping("drift_attention", cuda::drift::drift_statistics_kernel, grid,
                           cuda::drift::kNumThreads, stream, params, layout.drift, layout.cosines,
                           layout.masses);
}

}  // namespace elastic_cache
