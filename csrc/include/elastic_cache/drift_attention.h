// window_attention, and from the same weights what the policy needs to know about a layer's
// attention (ALGORITHM.md 4.5 and 4.6), per sequence:
//   mass[k]    = sum over heads and window rows of p_new[h, row, k]
//   similarity = mean over (tracked row, key k) of cos(p_old[:, row, k], p_new[:, row, k]),
// p_new = softmax of scale * q . K[k] with the cache as it is now, p_old = softmax of
// scale * q_old . K_old[k], K_old = the cache with the overwritten rows put back.
// The subtle thing: the cosine runs over the HEAD axis, one H-vector per (tracked row, key).
// Each norm is clamped to at least 1e-8, as torch.nn.functional.cosine_similarity does.
// No tracked row: similarity = +infinity, below no threshold. Keys outside the range: mass = 0.
// Tracked rows beyond `max_tracked`, counted through all sequences: similarity = NaN. The bound is
// what sizes the work of a GPU, where nobody looks at the segments.
// Every row, whatever its segment, gets the out and lse of window_attention, in the same bits.
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
  int64_t max_tracked = -1;  // of all sequences together; -1: of any number

  const void* q_cache;       // [N, H, D] dtype
  const void* k_cache;       // [N, Hkv, D] dtype
  const void* v_cache;       // [N, Hkv, D] dtype
  const void* q_old;         // [R, H, D] dtype, or null when no segment has tracked rows
  const void* k_old;         // [R, Hkv, D] dtype, or null likewise
  const int32_t* rows;       // [R] slots, -1 = skip (output rows are zero, lse = 0)
  const int32_t* segments;   // [S, kSegmentColumns]; a segment's rows are of its sequence
  const int32_t* key_range;  // [S, 2] first and one-past-last key position

  void* out;           // [R, H, D] dtype out
  float* lse;          // [R, H] out
  float* mass;         // [S, C] out
  double* similarity;  // [S] out

  // CUDA only: drift_attention_workspace() bytes, aligned to 16; contents do not matter.
  void* workspace = nullptr;
};

void drift_attention_cpu(const DriftAttentionParams& params);

// A function of the sizes and of max_tracked. Any even head_dim up to 384 works; bfloat16 with 32,
// 64 or 128 uses tensor cores.
int64_t drift_attention_workspace(const DriftAttentionParams& params);
void drift_attention_cuda(const DriftAttentionParams& params, Stream stream);

}  // namespace elastic_cache
