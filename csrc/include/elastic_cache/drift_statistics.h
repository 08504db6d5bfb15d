// What the policy needs to know about the attention of some layers (ALGORITHM.md 4.5 and 4.6), per
// layer and sequence:
//   mass[k]    = sum over heads and window rows of p_new[h, row, k]
//   similarity = mean over (tracked row, key k) of cos(p_old[:, row, k], p_new[:, row, k]),
// p_new = softmax of scale * q . K[k] with the cache as it is now, p_old = softmax of
// scale * q_old . K_old[k], K_old = the cache with the overwritten rows put back.
// The subtle thing: the cosine runs over the HEAD axis, one H-vector per (tracked row, key).
// Each norm is clamped to at least 1e-8, as torch.nn.functional.cosine_similarity does.
// No tracked row: similarity = +infinity, below no threshold. Keys outside the range: mass = 0.
#pragma once

#include "elastic_cache/types.h"

namespace elastic_cache {

struct DriftStatisticsParams {
  DType dtype;
  int64_t num_layers;     // L
  int64_t num_sequences;  // S
  int64_t num_rows;       // R
  int64_t num_old_rows;   // R' >= R, between the layers of q_old, k_old and lse
  int64_t num_heads;      // H
  int64_t num_kv_heads;   // Hkv
  int64_t head_dim;       // D
  int64_t capacity;       // C; sequence of a row = slot / C
  float scale;

  const void* q_cache;       // [L, N, H, D] dtype
  const void* k_cache;       // [L, N, Hkv, D] dtype
  const void* q_old;         // [L, R', H, D] dtype, or null when no segment has tracked rows
  const void* k_old;         // [L, R', Hkv, D] dtype, or null likewise
  const float* lse;          // [L, R', H] what window_attention gave the rows; null: not known
  const int32_t* rows;       // [R] slots, -1 = skip
  const int32_t* segments;   // [S, kSegmentColumns]; a segment's rows are of its sequence
  const int32_t* key_range;  // [S, 2] first and one-past-last key position

  float* mass;         // [L, S, C] out
  double* similarity;  // [L, S] out

  // CUDA only: drift_statistics_workspace() bytes, aligned to 16; contents do not matter.
  void* workspace = nullptr;
};

void drift_statistics_cpu(const DriftStatisticsParams& params);

// A function of the sizes. Any even head_dim works; bfloat16 with 32, 64 or 128 uses tensor cores.
int64_t drift_statistics_workspace(const DriftStatisticsParams& params);
void drift_statistics_cuda(const DriftStatisticsParams& params, Stream stream);

}  // namespace elastic_cache
