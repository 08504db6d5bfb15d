// cache_write of one row. Rows write to distinct slots, so they are independent of each other;
// within a row the old values are saved before anything is overwritten.
#pragma once

#include <cstring>

#include "common.h"
#include "elastic_cache/cache_write.h"

namespace elastic_cache {

inline constexpr double kCacheWriteNanoseconds = 0.2;  // an element of qkv, of one core with AVX2

// Rotates one head; half = D / 2, rope = half cosines, then half sines.
template <class T>
inline void rotate(const T* from, const float* rope, int64_t half, T* to) {
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Float8 cosine = load8(rope + i), sine = load8(rope + half + i);
    const Float8 a = load8(from + i), b = load8(from + half + i);
    store8(to + i, a * cosine - b * sine);
    store8(to + half + i, b * cosine + a * sine);
  }
  for (; i < half; ++i) {
    const float cosine = rope[i], sine = rope[half + i];
    const float a = to_float(from[i]), b = to_float(from[half + i]);
    to[i] = from_float<T>(a * cosine - b * sine);
    to[half + i] = from_float<T>(b * cosine + a * sine);
  }
}

// saved[row] = cache[slot], or zero for a skipped row; nothing without `saved`.
template <class T>
inline void save_row(const void* cache, int64_t slot, int64_t row, int64_t width, void* saved) {
  if (!saved) return;
  const size_t bytes = static_cast<size_t>(width) * sizeof(T);
  T* to = static_cast<T*>(saved) + row * width;
  if (slot < 0) {
    std::memset(static_cast<void*>(to), 0, bytes);
  } else {
    std::memcpy(to, static_cast<const T*>(cache) + slot * width, bytes);
  }
}

inline bool is_query_saved(const CacheWriteParams& p, int64_t row) {
  for (int64_t s = 0; s < p.num_segments; ++s) {
    const int32_t* segment = p.segments + s * kSegmentColumns;
    const int64_t rank = row - segment[kSegmentBegin];
    if (rank >= 0 && rank < segment[kSegmentTracked]) return true;
  }
  return !p.segments;
}

template <class T>
inline void cache_write_row(const CacheWriteParams& p, int64_t row) {
  const int64_t dim = p.head_dim, q_width = p.num_heads * dim, kv_width = p.num_kv_heads * dim;
  const int64_t slot = p.rows[row];
  if (is_query_saved(p, row)) save_row<T>(p.q_cache, slot, row, q_width, p.q_old);
  save_row<T>(p.k_cache, slot, row, kv_width, p.k_old);
  if (slot < 0) return;

  const T* from = static_cast<const T*>(p.qkv) + row * p.qkv_row_stride;
  const float* rope = p.rope + slot % p.capacity * dim;
  T* q = static_cast<T*>(p.q_cache) + slot * q_width;
  T* k = static_cast<T*>(p.k_cache) + slot * kv_width;
  T* v = static_cast<T*>(p.v_cache) + slot * kv_width;
  for (int64_t h = 0; h < p.num_heads; ++h) rotate(from + h * dim, rope, dim / 2, q + h * dim);
  from += q_width;
  for (int64_t h = 0; h < p.num_kv_heads; ++h) rotate(from + h * dim, rope, dim / 2, k + h * dim);
  std::memcpy(v, from + kv_width, static_cast<size_t>(kv_width) * sizeof(T));
}

}  // namespace elastic_cache
