// window_attention of a layer, then drift_statistics of the same layer. On the CPU one sweep over
// the keys serves both; a GPU is better off with window_attention in every layer and one call of
// drift_statistics for all of them.
// Every row gets the out and lse of window_attention, in the same bits.
#pragma once

#include "elastic_cache/types.h"

namespace elastic_cache {

struct DriftAttentionParams {
  DType dtype;
  int64_t num_sequences;  // S
  int64_t num_rows;       // R
  int64_t num_heads;      // H
  int64_t num_kv_heads;   // Hkv
  int64_t head_dim;       // D
  int64_t capacity;       // C; sequence of a row = slot / C
  float scale;

  const void* q_cache;       // [N, H, D] dtype
  const void* k_cache;       // [N, Hkv, D] dtype
  const void* v_cache;       // [N, Hkv, D] dtype; null: the statistics alone, and no out and lse
  const void* q_old;         // [R, H, D] dtype, or null when no segment has tracked rows
  const void* k_old;         // [R, Hkv, D] dtype, or null likewise
  const int32_t* rows;       // [R] slots, -1 = skip (output rows are zero, lse = 0)
  const int32_t* segments;   // [S, kSegmentColumns]; rows lie as window_attention says
  const int32_t* key_range;  // [S, 2] first and one-past-last key position

  void* out;           // [R, H, D] dtype out
  float* lse;          // [R, H] out
  float* mass;         // [S, C] out
  double* similarity;  // [S] out

  // CUDA only: drift_attention_workspace() bytes, aligned to 16; contents do not matter.
  void* workspace = nullptr;
};

void drift_attention_cpu(const DriftAttentionParams& params);

// A function of the sizes.
int64_t drift_attention_workspace(const DriftAttentionParams& params);
void drift_attention_cuda(const DriftAttentionParams& params, Stream stream);

}  // namespace elastic_cache
