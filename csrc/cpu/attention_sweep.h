// Attention of a few lanes (see lane_product.h) of one key/value head over all of its keys: online
// softmax over blocks of keys. What window_attention and drift_attention share, so that a row comes
// out of both in the same bits.
// The subtle thing: scores are kept in base 2 (q is scaled by scale * log2 e when it is packed), so
// that the exponential is a bare 2^x; lse is converted back to base e at the end.
#pragma once

#include <cmath>
#include <limits>

#include "lane_product.h"

namespace elastic_cache {

inline constexpr double kLn2 = 0.69314718055994530942;
inline constexpr int64_t kMaxVectors = 6;  // of lanes, per task
// Scores and values of a block, queries and outputs stay in a 32 KB first-level cache at D = 32.
inline constexpr int64_t kBlockKeys = 48;
// Of one element of a score and of an output, softmax included: what decides on going parallel.
inline constexpr double kNanosecondsPerScoreElement = 0.03;

// One head's part of the cache, from the first key of the range on.
template <class T>
struct HeadCache {
  const T* keys;
  const T* values;
  int64_t stride;
  int64_t num_keys;
  int64_t dim;
};

// Works for WindowAttentionParams and DriftAttentionParams.
template <class T, class Params>
HeadCache<T> head_cache(const Params& p, int64_t sequence, int64_t kv_head) {
  const int64_t first = p.key_range[2 * sequence], stride = p.num_kv_heads * p.head_dim;
  const int64_t start = (sequence * p.capacity + first) * stride + kv_head * p.head_dim;
  const int64_t num_keys = std::max<int64_t>(p.key_range[2 * sequence + 1] - first, 0);
  return {static_cast<const T*>(p.k_cache) + start, static_cast<const T*>(p.v_cache) + start,
          stride, num_keys, p.head_dim};
}

// Memory of one thread; lanes of the query and the output are as many as the task has.
struct SweepBuffers {
  float* query;   // [D, lanes]
  float* output;  // [D, lanes]
  float* keys;    // [keys of a block, D]
  float* values;  // [keys of a block, D]
  float* scores;  // [keys of a block, lanes]
  Float8 max[kMaxVectors];
  Float8 sum[kMaxVectors];

  static int64_t size(int64_t dim) {
    return (2 * dim + kBlockKeys) * kMaxVectors * kLanes + 2 * round_up(kBlockKeys * dim, 16);
  }
  SweepBuffers(float* memory, int64_t dim)
      : query(memory),
        output(query + dim * kMaxVectors * kLanes),
        keys(output + dim * kMaxVectors * kLanes),
        values(keys + round_up(kBlockKeys * dim, 16)),
        scores(values + round_up(kBlockKeys * dim, 16)) {}
};

// scores -> 2^(scores - max); `rescale` is what earlier blocks have to be multiplied with.
template <int NV>
void update_softmax(const LaneRows& scores, int64_t num_keys, SweepBuffers& state,
                    Float8* rescale) {
  Float8 top[NV], total[NV] = {};
  for (int v = 0; v < NV; ++v) top[v] = state.max[v];
  for (int64_t k = 0; k < num_keys; ++k) {
    for (int v = 0; v < NV; ++v) {
      top[v] = max(load8(scores.data + k * scores.stride + v * kLanes), top[v]);
    }
  }
  for (int64_t k = 0; k < num_keys; ++k) {
    for (int v = 0; v < NV; ++v) {
      float* at = scores.data + k * scores.stride + v * kLanes;
      const Float8 p = exp2_flush(load8(at) - top[v]);
      total[v] += p;
      store8(at, p);
    }
  }
  for (int v = 0; v < NV; ++v) {
    rescale[v] = exp2_flush(state.max[v] - top[v]);
    state.sum[v] = multiply_add(state.sum[v], rescale[v], total[v]);
    state.max[v] = top[v];
  }
}

// Sweeps NV vectors of lanes, whose queries are packed in w.query, over all keys; the first
// `num_outputs` of them get outputs, none: values are not read. `block_scores(begin)` says where
// the scores of the block from key `begin` on go, `scored(begin, n)` may change them,
// `weighted(begin)` sees w.max after them.
template <int NV, class T, class Lanes>
void sweep_keys(const HeadCache<T>& c, int64_t num_outputs, SweepBuffers& w, const Lanes& lanes) {
  constexpr int64_t kWidth = NV * kLanes;
  for (int v = 0; v < NV; ++v) {
    w.max[v] = splat(-std::numeric_limits<float>::infinity());
    w.sum[v] = Float8{};
  }
  std::fill(w.output, w.output + c.dim * kWidth, 0.0f);
  for (int64_t begin = 0; begin < c.num_keys; begin += kBlockKeys) {
    const int64_t n = std::min(kBlockKeys, c.num_keys - begin), next = begin + n;
    const LaneRows scores = lanes.block_scores(begin);
    RowPrefetch<T> values(c.values + begin * c.stride, c.stride, num_outputs == 0 ? 0 : n, c.dim);
    const Operand k = rows_operand(c.keys + begin * c.stride, c.stride, n, c.dim, w.keys);
    lane_product<NV>({w.query, kWidth}, k, c.dim, n, nullptr, scores,
                     [&](int64_t count) { values.next(count); });
    values.rest();
    lanes.scored(begin, n, scores);
    Float8 rescale[NV];
    update_softmax<NV>(scores, n, w, rescale);
    lanes.weighted(begin);
    if (num_outputs == 0) continue;
    copy_rows(c.values + begin * c.stride, c.stride, n, c.dim, w.values);
    const int64_t num_next = std::min(kBlockKeys, c.num_keys - next);
    const int64_t share = (num_next + c.dim - 1) / c.dim;
    RowPrefetch<T> keys(c.keys + next * c.stride, c.stride, num_next, c.dim);
    with_vectors(num_outputs, [&](auto vectors) {
      if constexpr (vectors() <= NV) {
        lane_product<vectors()>(scores, {w.values, c.dim, 1}, n, c.dim, rescale, {w.output, kWidth},
                                [&](int64_t count) { keys.next(count * share); });
      }
    });
  }
}

// Lane `lane` of a swept task -> its row of out and its lse.
template <class T>
void write_lane(const SweepBuffers& w, int64_t lane, int64_t width, int64_t dim, bool has_keys,
                T* out, float* lse) {
  const float max = w.max[lane / kLanes][lane % kLanes], sum = w.sum[lane / kLanes][lane % kLanes];
  const float inverse = has_keys ? 1.0f / sum : 0.0f;
  *lse = static_cast<float>(static_cast<double>(max) * kLn2 + std::log(double{sum}));
  for (int64_t d = 0; d < dim; ++d) out[d] = from_float<T>(w.output[d * width + lane] * inverse);
}

// Rows that are skipped.
template <class T, class Params>
void clear_skipped_rows(const Params& p) {
  const int64_t width = p.num_heads * p.head_dim;
  for (int64_t r = 0; r < p.num_rows; ++r) {
    if (p.rows[r] >= 0) continue;
    T* out = static_cast<T*>(p.out) + r * width;
    std::fill(out, out + width, T{});
    std::fill(p.lse + r * p.num_heads, p.lse + (r + 1) * p.num_heads, 0.0f);
  }
}

}  // namespace elastic_cache
