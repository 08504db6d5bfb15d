// Attention of a few rows over all cached keys of their sequence, no mask, with log-sum-exp:
//   s[k] = scale * q . K[k],  lse = log sum_k exp(s[k]),  out = sum_k exp(s[k] - lse) V[k]
// for k in the sequence's key range (an empty one gives out = 0, lse = -infinity). Queries are
// read from the cache at the rows' slots.
// Given segments, rows lie sequence by sequence as they say, from row 0 on, and behind them none is
// valid. For several sequences a GPU takes 1.5 to 3.5 times as long without them.
#pragma once

#include "elastic_cache/types.h"

namespace elastic_cache {

struct WindowAttentionParams {
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
  const void* v_cache;       // [N, Hkv, D] dtype
  const int32_t* rows;       // [R] slots, -1 = skip (output rows are zero, lse = 0)
  const int32_t* segments;   // [S, kSegmentColumns], or null: rows are in any order
  const int32_t* key_range;  // [S, 2] first and one-past-last key position

  void* out;   // [R, H, D] dtype
  float* lse;  // [R, H]

  // CUDA only: window_attention_workspace() bytes, aligned to 16; contents do not matter.
  void* workspace = nullptr;
};

void window_attention_cpu(const WindowAttentionParams& params);

// A function of the sizes alone. Any even head_dim up to 512 works; bfloat16 with 32, 64 or 128
// uses tensor cores.
int64_t window_attention_workspace(const WindowAttentionParams& params);
void window_attention_cuda(const WindowAttentionParams& params, Stream stream);

}  // namespace elastic_cache
