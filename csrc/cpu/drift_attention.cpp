// Per sequence two phases, each shared by the threads of one parallel region:
//   attend   per key/value head and up to 48 of its lanes: the sweep of window_attention
//            (attention_sweep.h) over present queries and, for tracked rows, also those before;
//            the weights 2^(score - maximum so far) of all keys are kept
//   compare  per block of keys: weights -> probabilities, their sum over heads and window rows,
//            and the cosines over heads
// Lanes of a head: window rows, other rows, tracked rows, tracked rows as they were.
// The subtle thing: old queries must not see the keys written since. They are few, so the old
// lanes are multiplied with the whole cache as well, and their scores at overwritten keys replaced.
// Blocks do not depend on the number of threads and partial sums are added in a fixed order, so
// neither do the results.
#include "elastic_cache/drift_attention.h"

#include <limits>
#include <vector>

#include "attention_sweep.h"

namespace elastic_cache {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Lane {
  int64_t row;
  int64_t head;  // of the heads that share the key/value head
};

struct Overwritten {
  int64_t key;  // from the first of the range on
  int64_t row;
};

// What a sequence needs, found before the parallel region.
struct Sequence {
  int64_t index;
  int64_t first_key;
  int64_t num_keys;
  int64_t num_window = 0;                // lanes
  int64_t num_tracked = 0;               // rows
  std::vector<Lane> lanes;               // present ones, then old ones
  int64_t num_new = 0;                   // present lanes
  std::vector<Overwritten> overwritten;  // ascending keys

  int64_t num_vectors() const {
    return round_up(static_cast<int64_t>(lanes.size()), kLanes) / kLanes;
  }
  int64_t width() const { return num_vectors() * kLanes; }
  int64_t num_blocks() const { return (num_keys + kBlockKeys - 1) / kBlockKeys; }
  // First lane of the tracked rows of a head of the group.
  int64_t new_lane(int64_t group, int64_t head) const {
    return num_new - (group - head) * num_tracked;
  }
  int64_t old_lane(int64_t head) const { return num_new + head * num_tracked; }
};

// Valid rows of a sequence; `other` are committed or lookahead rows, or of no segment.
struct RowKinds {
  std::vector<int64_t> window, other, tracked;
};

RowKinds sort_rows(const DriftAttentionParams& p, int64_t s) {
  const int32_t* segment = p.segments + s * kSegmentColumns;
  const int64_t begin = segment[kSegmentBegin], tracked_end = begin + segment[kSegmentTracked];
  const int64_t window = tracked_end + segment[kSegmentCommitted];
  const int64_t window_end = window + segment[kSegmentWindow];
  RowKinds kinds;
  for (int64_t r = 0; r < p.num_rows; ++r) {
    if (p.rows[r] < 0 || p.rows[r] / p.capacity != s) continue;
    const bool is_window = r >= window && r < window_end;
    const bool is_tracked = r >= begin && r < tracked_end;
    (is_window ? kinds.window : is_tracked ? kinds.tracked : kinds.other).push_back(r);
  }
  return kinds;
}

Sequence describe(const DriftAttentionParams& p, int64_t s) {
  const int64_t group = p.num_heads / p.num_kv_heads;
  const RowKinds kinds = sort_rows(p, s);
  Sequence q{
      .index = s, .first_key = p.key_range[2 * s], .num_keys = 0, .lanes = {}, .overwritten = {}};
  q.num_keys = std::max<int64_t>(p.key_range[2 * s + 1] - q.first_key, 0);
  q.num_tracked = static_cast<int64_t>(kinds.tracked.size());
  q.num_window = static_cast<int64_t>(kinds.window.size()) * group;
  const auto add = [&](const std::vector<int64_t>& rows) {
    for (int64_t head = 0; head < group; ++head) {
      for (const int64_t r : rows) q.lanes.push_back({r, head});
    }
  };
  add(kinds.window);
  if (p.out != nullptr) add(kinds.other);
  add(kinds.tracked);
  q.num_new = static_cast<int64_t>(q.lanes.size());
  if (q.num_tracked == 0) return q;
  add(kinds.tracked);
  for (const auto* rows : {&kinds.window, &kinds.other, &kinds.tracked}) {
    for (const int64_t r : *rows) {
      const int64_t key = p.rows[r] - s * p.capacity - q.first_key;
      if (key >= 0 && key < q.num_keys) q.overwritten.push_back({key, r});
    }
  }
  std::sort(q.overwritten.begin(), q.overwritten.end(),
            [](const Overwritten& a, const Overwritten& b) { return a.key < b.key; });
  return q;
}

// Shared by all threads, sized for the largest sequence. A probability is weight * factor.
struct Workspace {
  float* weights;   // [Hkv, keys, lanes]
  float* factors;   // [Hkv, blocks, lanes]; before a head is done, the maximum up to the block
  double* cosines;  // [blocks] sums over tracked rows and keys
};

// Vectors begin .. end - 1 of the lanes of a head.
template <class T>
class AttendTask {
 public:
  AttendTask(const DriftAttentionParams& p, const Sequence& q, const Workspace& w, int64_t kv_head,
             int64_t begin, int64_t end, SweepBuffers& b)
      : p_(p),
        q_(q),
        b_(b),
        kv_head_(kv_head),
        first_(begin * kLanes),
        width_((end - begin) * kLanes),
        num_lanes_(std::min(width_, static_cast<int64_t>(q.lanes.size()) - first_)),
        num_new_(std::clamp<int64_t>(q.num_new - first_, 0, num_lanes_)),
        weights_{w.weights + kv_head * q.num_keys * q.width() + first_, q.width()},
        factors_{w.factors + kv_head * q.num_blocks() * q.width() + first_, q.width()} {}

  void pack() const;
  void finish() const;

  // The steps of a sweep.
  LaneRows block_scores(int64_t begin) const {
    return {weights_.data + begin * weights_.stride, weights_.stride};
  }
  void scored(int64_t begin, int64_t n, const LaneRows& scores) const;
  void weighted(int64_t begin) const {
    store_lanes(b_.max, factors_.data + begin / kBlockKeys * factors_.stride);
  }

 private:
  void store_lanes(const Float8* from, float* to) const {
    for (int64_t v = 0; v < width_ / kLanes; ++v) store8(to + v * kLanes, from[v]);
  }
  const Lane& lane(int64_t i) const { return q_.lanes[static_cast<size_t>(first_ + i)]; }
  int64_t head(int64_t i) const {
    return kv_head_ * (p_.num_heads / p_.num_kv_heads) + lane(i).head;
  }

  const DriftAttentionParams& p_;
  const Sequence& q_;
  SweepBuffers& b_;
  int64_t kv_head_;
  int64_t first_;  // lane
  int64_t width_;  // lanes, padding included
  int64_t num_lanes_;
  int64_t num_new_;  // of them
  LaneRows weights_;
  LaneRows factors_;
};

template <class T>
void AttendTask<T>::pack() const {
  const int64_t dim = p_.head_dim;
  const auto factor = static_cast<float>(p_.scale / kLn2);
  std::fill(b_.query, b_.query + dim * width_, 0.0f);
  for (int64_t i = 0; i < num_lanes_; ++i) {
    const bool is_new = i < num_new_;
    const int64_t row = is_new ? p_.rows[lane(i).row] : lane(i).row;
    const T* queries = static_cast<const T*>(is_new ? p_.q_cache : p_.q_old);
    pack_query(queries + (row * p_.num_heads + head(i)) * dim, factor, dim, width_, b_.query + i);
  }
}

// Old lanes see the keys of the block as they were.
template <class T>
void AttendTask<T>::scored(int64_t begin, int64_t n, const LaneRows& scores) const {
  if (num_new_ == num_lanes_) return;
  const int64_t dim = p_.head_dim;
  const auto after = [](int64_t key, const Overwritten& o) { return key <= o.key; };
  auto first = std::upper_bound(q_.overwritten.begin(), q_.overwritten.end(), begin, after);
  int64_t count = 0;
  for (auto o = first; o != q_.overwritten.end() && o->key < begin + n; ++o, ++count) {
    const int64_t at = (o->row * p_.num_kv_heads + kv_head_) * dim;
    copy_rows(static_cast<const T*>(p_.k_old) + at, dim, 1, dim, b_.keys + count * dim);
  }
  if (count == 0) return;
  const int64_t vector = num_new_ / kLanes;
  const LaneRows corrected{b_.scores, width_};
  with_vectors(width_ / kLanes - vector, [&](auto vectors) {
    score_block<vectors()>(LaneRows{b_.query, width_}.from(vector), {b_.keys, 1, dim}, dim, count,
                           corrected.from(vector), [](int64_t) {});
  });
  for (int64_t i = 0; i < count; ++i, ++first) {
    float* to = scores.data + (first->key - begin) * scores.stride;
    const float* from = corrected.data + i * width_;
    std::copy(from + num_new_, from + num_lanes_, to + num_new_);
  }
}

template <class T>
void AttendTask<T>::finish() const {
  const int64_t dim = p_.head_dim;
  for (int64_t v = 0; v < width_ / kLanes; ++v) {
    const Float8 inverse = 1.0f / b_.sum[v];
    for (int64_t block = 0; block < q_.num_blocks(); ++block) {
      float* at = factors_.data + block * factors_.stride + v * kLanes;
      store8(at, exp2_flush(load8(at) - b_.max[v]) * inverse);
    }
  }
  for (int64_t i = 0; i < num_new_ && p_.out != nullptr; ++i) {
    const int64_t at = lane(i).row * p_.num_heads + head(i);
    write_lane(b_, i, width_, dim, q_.num_keys > 0, static_cast<T*>(p_.out) + at * dim,
               p_.lse + at);
  }
}

// Heads `first` .. `last` - 1, vectors begin .. end - 1 of their lanes.
template <class T>
void attend(const DriftAttentionParams& p, const Sequence& q, const Workspace& w, int64_t first,
            int64_t last, int64_t begin, int64_t end, const HeadCache<T>& following,
            float* memory) {
  auto buffers = task_buffers(memory, p.head_dim);
  std::array<HeadCache<T>, kMaxHeads> cache;
  std::vector<AttendTask<T>> heads;
  heads.reserve(kMaxHeads);
  for (int64_t h = first; h < last; ++h) {
    const auto at = static_cast<size_t>(h - first);
    cache[at] = head_cache<T>(p, q.index, h);
    heads.emplace_back(p, q, w, h, begin, end, buffers[at]);
    heads.back().pack();
  }
  const int64_t num_new =
      std::clamp<int64_t>(q.num_new - begin * kLanes, 0, (end - begin) * kLanes);
  const int64_t num_outputs = p.out == nullptr ? 0 : round_up(num_new, kLanes) / kLanes;
  with_vectors(end - begin, [&](auto vectors) {
    sweep_heads<vectors()>(last - first, cache.data(), following, num_outputs, buffers.data(),
                           heads.data());
  });
  for (const AttendTask<T>& head : heads) head.finish();
}

// Probabilities of one key, or of eight lanes of it.
class KeyWeights {
 public:
  KeyWeights(const Sequence& q, const Workspace& w, int64_t key)
      : weights_(w.weights + key * q.width()),
        factors_(w.factors + key / kBlockKeys * q.width()),
        head_weights_(q.num_keys * q.width()),
        head_factors_(q.num_blocks() * q.width()) {}

  Float8 at(int64_t kv_head, int64_t lane) const {
    return load8(weights_ + kv_head * head_weights_ + lane) *
           load8(factors_ + kv_head * head_factors_ + lane);
  }

 private:
  const float* weights_;
  const float* factors_;
  int64_t head_weights_;
  int64_t head_factors_;
};

// The first `count` lanes of x, zero in the others.
inline Float8 first_lanes(Float8 x, int64_t count) {
  return Int8{0, 1, 2, 3, 4, 5, 6, 7} < static_cast<int32_t>(count) ? x : Float8{};
}

float key_mass(const DriftAttentionParams& p, const Sequence& q, const KeyWeights& weights) {
  const int64_t full = q.num_window / kLanes * kLanes;
  Float8 total = {};
  for (int64_t h = 0; h < p.num_kv_heads; ++h) {
    for (int64_t lane = 0; lane < full; lane += kLanes) total += weights.at(h, lane);
    if (full < q.num_window) total += first_lanes(weights.at(h, full), q.num_window - full);
  }
  return sum(total);
}

// Cosines over heads, old against new, of eight tracked rows at one key.
Float8 cosines(const DriftAttentionParams& p, const Sequence& q, const KeyWeights& weights,
               int64_t tracked) {
  const int64_t group = p.num_heads / p.num_kv_heads;
  Float8 dot = {}, old_square = {}, new_square = {};
  for (int64_t h = 0; h < p.num_kv_heads; ++h) {
    for (int64_t g = 0; g < group; ++g) {
      const Float8 a = weights.at(h, q.old_lane(g) + tracked);
      const Float8 b = weights.at(h, q.new_lane(group, g) + tracked);
      dot = multiply_add(a, b, dot);
      old_square = multiply_add(a, a, old_square);
      new_square = multiply_add(b, b, new_square);
    }
  }
  // Norms of at least 1e-8, under one root.
  const Float8 least = splat(1e-16f);
  return dot / sqrt(max(least, old_square) * max(least, new_square));
}

void compare_block(const DriftAttentionParams& p, const Sequence& q, const Workspace& w,
                   int64_t block) {
  const int64_t begin = block * kBlockKeys, end = std::min(begin + kBlockKeys, q.num_keys);
  float* mass = p.mass + q.index * p.capacity + q.first_key;
  Double4 total = {};
  for (int64_t k = begin; k < end; ++k) {
    const KeyWeights weights(q, w, k);
    mass[k] = key_mass(p, q, weights);
    for (int64_t t = 0; t < q.num_tracked; t += kLanes) {
      const Float8 c = first_lanes(cosines(p, q, weights, t), q.num_tracked - t);
      total += Double4{c[0], c[1], c[2], c[3]} + Double4{c[4], c[5], c[6], c[7]};
    }
  }
  w.cosines[block] = sum(total);
}

// f(i) for i in [0, n): by all threads of the parallel region, or by the calling one.
template <class F>
void share(bool is_alone, int64_t n, const F& f) {
  if (is_alone) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
#pragma omp for schedule(static)
  for (int64_t i = 0; i < n; ++i) f(i);
}

// Both phases of one sequence; called by every thread of a parallel region, or by one alone.
// `following` is the first head of the next sequence.
template <class T>
void run_sequence(const DriftAttentionParams& p, const Sequence& q, const Workspace& w,
                  const HeadCache<T>& following, float* memory, bool is_alone) {
  // More tasks of fewer lanes, if it takes that to give every thread one.
  const int64_t vectors = q.num_vectors(), num_heads = p.num_kv_heads;
  const int64_t threads = is_alone ? 1 : max_threads();
  int64_t chunks = (vectors + kMaxVectors - 1) / kMaxVectors;
  while (chunks < vectors && num_heads * chunks < threads) ++chunks;
  const int64_t per_task = std::max<int64_t>(heads_per_task(chunks, num_heads, threads), 1);
  const int64_t groups = (num_heads + per_task - 1) / per_task;
  share(is_alone, groups * chunks, [&](int64_t task) {
    const int64_t chunk = task % chunks, first = task / chunks * per_task;
    const int64_t next = (task + 1) / chunks * per_task;
    attend<T>(p, q, w, first, std::min(first + per_task, num_heads), vectors * chunk / chunks,
              vectors * (chunk + 1) / chunks,
              next < num_heads ? head_cache<T>(p, q.index, next) : following, memory);
  });
  share(is_alone, q.num_blocks(), [&](int64_t block) { compare_block(p, q, w, block); });
  share(is_alone, 1, [&](int64_t) {
    double total = 0.0;
    for (int64_t block = 0; block < q.num_blocks(); ++block) total += w.cosines[block];
    const int64_t count = q.num_tracked * q.num_keys;
    p.similarity[q.index] = count == 0 ? double{kInfinity} : total / static_cast<double>(count);
  });
}

// Scratch large enough for any of the sequences.
struct Sizes {
  int64_t weights = 0;
  int64_t factors = 0;
  int64_t blocks = 0;
  double nanoseconds = 0.0;
};

Sizes measure(const DriftAttentionParams& p, const std::vector<Sequence>& sequences) {
  Sizes sizes;
  for (const Sequence& q : sequences) {
    const int64_t scores = p.num_kv_heads * q.num_keys * q.width();
    sizes.weights = std::max(sizes.weights, scores);
    sizes.factors = std::max(sizes.factors, p.num_kv_heads * q.num_blocks() * q.width());
    sizes.blocks = std::max(sizes.blocks, q.num_blocks());
    sizes.nanoseconds += kNanosecondsPerScoreElement * static_cast<double>(scores * p.head_dim);
  }
  return sizes;
}

// Sequence by sequence with all threads; or a thread for each, which then finds the weights of one
// in its own cache and waits for nobody, if there are enough of them.
template <class T>
void run(const DriftAttentionParams& p, const std::vector<Sequence>& sequences) {
  const Sizes sizes = measure(p, sequences);
  const auto count = static_cast<int64_t>(sequences.size());
  const bool is_alone = max_threads() == 1 || count >= 2 * max_threads();
  const int64_t factors = round_up(sizes.weights, 16);
  // Eight lanes are read where fewer are meant: from the end of the factors, into the buffers.
  const int64_t own = factors + round_up(sizes.factors, 16);
  const int64_t task = SweepBuffers::size(p.head_dim), copies = is_alone ? max_threads() : 1;
  const Scratch scratch(own * copies + task * max_threads());
  std::vector<double> cosines(static_cast<size_t>(sizes.blocks * copies));
  const auto workspace = [&](int64_t copy) {
    float* memory = scratch.data() + own * copy;
    return Workspace{memory, memory + factors, cosines.data() + sizes.blocks * copy};
  };
#pragma omp parallel if (is_worth_sharing(sizes.nanoseconds))
  {
    float* memory = scratch.data() + own * copies + thread_index() * task;
    const Workspace w = workspace(is_alone ? thread_index() : 0);
    const auto run_one = [&](int64_t i) {
      const HeadCache<T> following = i + 1 < count ? head_cache<T>(p, i + 1, 0) : HeadCache<T>{};
      run_sequence<T>(p, sequences[static_cast<size_t>(i)], w, following, memory, is_alone);
    };
    if (is_alone) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < count; ++i) run_one(i);
    } else {
      for (int64_t i = 0; i < count; ++i) run_one(i);
    }
  }
}

}  // namespace

void drift_attention_cpu(const DriftAttentionParams& params) {
  std::vector<Sequence> sequences;
  sequences.reserve(static_cast<size_t>(params.num_sequences));
  for (int64_t s = 0; s < params.num_sequences; ++s) {
    sequences.push_back(describe(params, s));
    const Sequence& q = sequences.back();
    float* mass = params.mass + s * params.capacity;
    std::fill(mass, mass + q.first_key, 0.0f);
    std::fill(mass + q.first_key + q.num_keys, mass + params.capacity, 0.0f);
  }
  with_dtype(params.dtype, [&](auto zero) {
    if (params.out != nullptr) clear_skipped_rows<decltype(zero)>(params);
    run<decltype(zero)>(params, sequences);
  });
}

}  // namespace elastic_cache
