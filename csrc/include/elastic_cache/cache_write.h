// Splits fused qkv rows, rotates q and k (RoPE, NeoX halves, fp32) at their true positions and
// scatters q, k, v into the cache. The rows about to be overwritten are saved first, so that the
// drift test can see the cache as it was without a copy of it:
//   q_old[r] = q_cache[rows[r]];  k_old[r] = k_cache[rows[r]]   (both optional).
// The test asks for queries of tracked rows alone: given segments, others' are not saved.
// rotate: y[i] = x[i] cos[i] - x[i + D/2] sin[i];  y[i + D/2] = x[i + D/2] cos[i] + x[i] sin[i].
#pragma once

#include "elastic_cache/types.h"

namespace elastic_cache {

struct CacheWriteParams {
  DType dtype;
  int64_t num_rows;      // R
  int64_t num_heads;     // H
  int64_t num_kv_heads;  // Hkv
  int64_t head_dim;      // D, even
  int64_t capacity;      // C; position = slot % C
  int64_t num_segments;  // S; 0 without segments

  int64_t qkv_row_stride;  // elements between rows of qkv
  const void* qkv;         // [R, (H + 2 Hkv) * D] dtype: q heads, k heads, v heads
  const int32_t* rows;     // [R] slots, -1 = skip
  const float* rope;       // [positions, D]: D/2 cosines, then D/2 sines

  const int32_t* segments;  // [S, kSegmentColumns], or null: every row's q is saved
  void* q_cache;            // [N, H, D] dtype
  void* k_cache;            // [N, Hkv, D] dtype
  void* v_cache;            // [N, Hkv, D] dtype
  void* q_old;              // [R, H, D] dtype out, or null
  void* k_old;              // [R, Hkv, D] dtype out, or null
};

void cache_write_cpu(const CacheWriteParams& params);
void cache_write_cuda(const CacheWriteParams& params, Stream stream);

}  // namespace elastic_cache
