// Attention of a few lanes (see lane_product.h) of one key/value head over all of its keys: online
// softmax over blocks of keys. What window_attention and drift_attention share, so that a row comes
// out of both in the same bits.
// The subtle thing: scores are kept in base 2 (q is scaled by scale * log2 e when it is packed), so
// that the exponential is a bare 2^x; lse is converted back to base e at the end.
#pragma once

#include <array>
#include <cmath>
#include <limits>

#include "lane_product.h"

namespace elastic_cache {

inline constexpr double kLn2 = 0.69314718055994530942;
inline constexpr int64_t kMaxVectors = 6;  // of lanes, per task
inline constexpr int64_t kMaxHeads = 4;    // of keys and values, per task
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

// Memory of one head of a task; lanes of the query and the output are as many as the task has.
struct SweepBuffers {
  float* query;   // [D, lanes]
  float* output;  // [D, lanes]
  float* keys;    // [keys of a block, D]
  float* values;  // [keys of a block, D]
  float* scores;  // [keys of a block, lanes]
  Float8 max[kMaxVectors];
  Float8 sum[kMaxVectors];

  // Of `own` memory, of `shared` memory, which is for what a block needs, and of a whole task.
  static int64_t own_size(int64_t dim) { return 2 * dim * kMaxVectors * kLanes; }
  static int64_t shared_size(int64_t dim) {
    return kBlockKeys * kMaxVectors * kLanes + 2 * round_up(kBlockKeys * dim, 16);
  }
  static int64_t size(int64_t dim) { return kMaxHeads * own_size(dim) + shared_size(dim); }

  SweepBuffers() = default;
  SweepBuffers(float* own, float* shared, int64_t dim)
      : query(own),
        output(query + dim * kMaxVectors * kLanes),
        keys(shared),
        values(keys + round_up(kBlockKeys * dim, 16)),
        scores(values + round_up(kBlockKeys * dim, 16)) {}
};

// Of all heads of a task, in SweepBuffers::size floats.
inline std::array<SweepBuffers, kMaxHeads> task_buffers(float* memory, int64_t dim) {
  std::array<SweepBuffers, kMaxHeads> buffers;
  float* shared = memory + kMaxHeads * SweepBuffers::own_size(dim);
  for (SweepBuffers& b : buffers) {
    b = SweepBuffers(memory, shared, dim);
    memory += SweepBuffers::own_size(dim);
  }
  return buffers;
}

// Asks for a block of keys and values while the one before is swept, evenly over all of its
// products. What a task reads of a cache row is contiguous, but the sweeps take it head by head, a
// line or two at a time, which hardware prefetchers do not follow; and many lines at once would
// fill the queue of misses and stall.
template <class T>
class BlockPrefetch {
 public:
  // The block from key `begin` on, its keys alone if there are no outputs.
  BlockPrefetch(const HeadCache<T>& first_head, int64_t num_heads, int64_t begin, bool has_outputs)
      : next_(reinterpret_cast<const char*>(first_head.keys + begin * first_head.stride)),
        values_(reinterpret_cast<const char*>(first_head.values + begin * first_head.stride)),
        stride_(first_head.stride * static_cast<int64_t>(sizeof(T))),
        row_size_(num_heads * first_head.dim * static_cast<int64_t>(sizeof(T))),
        num_keys_(std::clamp<int64_t>(first_head.num_keys - begin, 0, kBlockKeys)),
        num_rows_(has_outputs ? 2 * num_keys_ : num_keys_),
        num_columns_(num_heads * (kBlockKeys + (has_outputs ? first_head.dim : 0))) {}

  // `count` columns of the block's products are done.
  void next(int64_t count) {
    num_done_ += count;
    fetch(std::min(num_rows_ * num_done_ / num_columns_, num_rows_));
  }
  void rest() { fetch(num_rows_); }

 private:
  // Inlined, it takes registers from the tile of a product.
  [[gnu::noinline]] void fetch(int64_t end) {
    for (; row_ < end; ++row_, next_ += stride_) {
      if (row_ == num_keys_) next_ = values_;
      for (int64_t at = 0; at < row_size_; at += 64) __builtin_prefetch(next_ + at, 0, 2);
    }
  }

  const char* next_;
  const char* values_;
  int64_t stride_;  // bytes
  int64_t row_size_;
  int64_t num_keys_;
  int64_t num_rows_;  // of keys, then of values
  int64_t num_columns_;
  int64_t num_done_ = 0;
  int64_t row_ = 0;
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

template <int NV>
void begin_sweep(SweepBuffers& w, int64_t dim) {
  for (int v = 0; v < NV; ++v) {
    w.max[v] = splat(-std::numeric_limits<float>::infinity());
    w.sum[v] = Float8{};
  }
  std::fill(w.output, w.output + dim * NV * kLanes, 0.0f);
}

// Scores of n keys, summed in parts: one after the other 64 or 128 terms have up to twice the
// error.
template <int NV, class Between>
void score_block(const LaneRows& query, const Operand& keys, int64_t dim, int64_t n,
                 const LaneRows& scores, const Between& between) {
  constexpr int64_t kTerms = 32;
  lane_product<NV>(query, keys, std::min(dim, kTerms), n, nullptr, scores, between);
  Float8 one[NV];
  for (Float8& x : one) x = splat(1.0f);
  for (int64_t d = kTerms; d < dim; d += kTerms) {
    const LaneRows part{query.data + d * query.stride, query.stride};
    const Operand from{keys.data + d * keys.step_i, keys.step_i, keys.step_j};
    lane_product<NV>(part, from, std::min(dim - d, kTerms), n, one, scores, [](int64_t) {});
  }
}

// Sweeps NV vectors of lanes, whose queries are packed in w.query, over the block of keys from
// `begin` on; the first `num_outputs` of them get outputs, none: values are not read.
// `block_scores(begin)` says where the scores of the block go, `scored(begin, n)` may change them,
// `weighted(begin)` sees w.max after them.
template <int NV, class T, class Lanes>
void sweep_block(const HeadCache<T>& c, int64_t begin, int64_t num_outputs, SweepBuffers& w,
                 const Lanes& lanes, BlockPrefetch<T>& ahead) {
  constexpr int64_t kWidth = NV * kLanes;
  const int64_t n = std::min(kBlockKeys, c.num_keys - begin);
  const LaneRows scores = lanes.block_scores(begin);
  const Operand k = rows_operand(c.keys + begin * c.stride, c.stride, n, c.dim, w.keys);
  score_block<NV>({w.query, kWidth}, k, c.dim, n, scores,
                  [&](int64_t count) { ahead.next(count); });
  lanes.scored(begin, n, scores);
  Float8 rescale[NV];
  update_softmax<NV>(scores, n, w, rescale);
  lanes.weighted(begin);
  if (num_outputs == 0) return;
  copy_rows(c.values + begin * c.stride, c.stride, n, c.dim, w.values);
  with_vectors(num_outputs, [&](auto vectors) {
    if constexpr (vectors() <= NV) {
      lane_product<vectors()>(scores, {w.values, c.dim, 1}, n, c.dim, rescale, {w.output, kWidth},
                              [&](int64_t count) { ahead.next(count); });
    }
  });
}

// All keys of some heads of one sequence: block by block, and in each head by head, so that the
// cache is read as it lies in memory. `following` is the first head of the thread's next task, or
// one without keys.
template <int NV, class T, class Lanes>
void sweep_heads(int64_t num_heads, const HeadCache<T>* cache, const HeadCache<T>& following,
                 int64_t num_outputs, SweepBuffers* w, const Lanes* lanes) {
  for (int64_t h = 0; h < num_heads; ++h) begin_sweep<NV>(w[h], cache[h].dim);
  for (int64_t begin = 0; begin < cache[0].num_keys; begin += kBlockKeys) {
    const int64_t next = begin + kBlockKeys;
    const bool is_last = next >= cache[0].num_keys;
    BlockPrefetch<T> ahead(is_last ? following : cache[0], num_heads, is_last ? 0 : next,
                           num_outputs > 0);
    for (int64_t h = 0; h < num_heads; ++h) {
      sweep_block<NV>(cache[h], begin, num_outputs, w[h], lanes[h], ahead);
    }
    ahead.rest();
  }
}

// Key/value heads that a task sweeps together: as many as leave a task for every thread.
inline int64_t heads_per_task(int64_t num_chunks, int64_t num_heads, int64_t num_threads) {
  int64_t heads = std::min(kMaxHeads, num_heads);
  while (heads > 1 && num_chunks * (num_heads / heads) < num_threads) --heads;
  return heads;
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
