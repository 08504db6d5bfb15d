// Per sequence two phases, each shared by the threads of one parallel region:
//   scan     per block of keys: scores of all lanes against the cache as it is now, in one product;
//            column mass; new and old scores of the tracked rows;
//   compare  per tracked row: scores -> probabilities, old ones by a softmax over keys; the cosines
//            over heads.
// Lanes of a head (see lane_product.h): window rows, tracked rows, then tracked rows as they were.
// The subtle thing: old queries must not see the keys written since. They are few, so the old
// lanes are multiplied with the whole cache as well, and their scores at overwritten keys replaced.
// Every block is computed the same way by whichever thread, and partial sums are added in a fixed
// order: results do not depend on the number of threads.
#include "elastic_cache/drift_statistics.h"

#include <cmath>
#include <limits>
#include <vector>

#include "lane_product.h"

namespace elastic_cache {
namespace {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Small enough to share 350 keys evenly between a few threads.
constexpr int64_t kBlockKeys = 18;

// What a sequence needs, found before the parallel region. Scores and probabilities of tracked rows
// are [tracked, H, padded keys]: keys fastest.
struct Sequence {
  int64_t index;
  int64_t first_tracked;  // tracked rows of the sequences before
  int64_t first_key;
  int64_t num_keys;
  std::vector<int64_t> window_rows;
  std::vector<int64_t> tracked_rows;
  std::vector<int32_t> overwritten_by;  // [num_keys] row that wrote the key, or -1

  int64_t num_window() const { return static_cast<int64_t>(window_rows.size()); }
  int64_t num_tracked() const { return static_cast<int64_t>(tracked_rows.size()); }
  int64_t num_lanes() const { return num_window() + 2 * num_tracked(); }
  int64_t lanes() const { return round_up(num_lanes(), kLanes); }
  int64_t padded_keys() const { return round_up(num_keys, kLanes); }
  int64_t num_blocks() const { return (num_keys + kBlockKeys - 1) / kBlockKeys; }
};

Sequence describe(const DriftStatisticsParams& p, int64_t s, int64_t first_tracked) {
  const int32_t* segment = p.segments + s * kSegmentColumns;
  const int64_t tracked_end = segment[kSegmentBegin] + segment[kSegmentTracked];
  const int64_t window = tracked_end + segment[kSegmentCommitted];
  const int64_t window_end = window + segment[kSegmentWindow];
  Sequence q{s, first_tracked, p.key_range[2 * s], 0, {}, {}, {}};
  q.num_keys = std::max<int64_t>(p.key_range[2 * s + 1] - q.first_key, 0);
  for (int64_t r = window; r < window_end; ++r) {
    if (p.rows[r] >= 0) q.window_rows.push_back(r);
  }
  for (int64_t r = segment[kSegmentBegin]; r < tracked_end; ++r) {
    if (p.rows[r] >= 0) q.tracked_rows.push_back(r);
  }
  if (q.num_tracked() == 0) return q;
  q.overwritten_by.assign(static_cast<size_t>(q.num_keys), -1);
  for (int64_t r = segment[kSegmentBegin]; r < window_end + segment[kSegmentLookahead]; ++r) {
    const int64_t key = p.rows[r] < 0 ? -1 : p.rows[r] - s * p.capacity - q.first_key;
    if (key >= 0 && key < q.num_keys) {
      q.overwritten_by[static_cast<size_t>(key)] = static_cast<int32_t>(r);
    }
  }
  return q;
}

// Scratch of all sequences in turn, and of every thread.
struct Workspace {
  float* query;   // [H, D, lanes]
  float* lse;     // [H, lanes] in base 2; +inf where no probability is wanted
  float* recent;  // [tracked, H, padded keys] new probabilities
  float* old;     // [tracked, H, padded keys] old scores, then old probabilities
  double* cosines;  // [tracked of all sequences] sums over keys
};

// Memory of one thread.
struct BlockBuffers {
  float* scores;     // [keys of a block, lanes]
  float* corrected;  // [keys of a block, lanes]
  float* keys;       // [keys of a block, D]
  float* mass;       // [keys of a block, 8] partial sums
};

template <class T>
class DriftTask {
 public:
  DriftTask(const DriftStatisticsParams& p, const Sequence& q, const Workspace& w)
      : p_(p), q_(q), w_(w), lanes_(q.lanes()) {}

  void pack_head(int64_t h) const;
  void scan_block(int64_t block, const BlockBuffers& b) const;
  double compare_row(int64_t tracked) const;

 private:
  void normalise(int64_t tracked_head) const;
  void score_head(int64_t h, int64_t begin, int64_t n, const BlockBuffers& b) const;
  void correct_old_lanes(int64_t h, int64_t begin, int64_t n, const BlockBuffers& b) const;
  void add_mass(const float* scores, int64_t h, int64_t n, float* mass) const;
  // Scores of lanes first .. first + tracked - 1 -> rows of `to`, keys fastest.
  void save_lanes(const float* scores, int64_t first, int64_t h, int64_t begin, int64_t n,
                  float* to) const;

  const DriftStatisticsParams& p_;
  const Sequence& q_;
  const Workspace& w_;
  int64_t lanes_;
};

template <class T>
void DriftTask<T>::pack_head(int64_t h) const {
  const int64_t dim = p_.head_dim;
  const float factor = p_.scale * kLog2E;
  float* query = w_.query + h * dim * lanes_;
  float* lse = w_.lse + h * lanes_;
  std::fill(query, query + dim * lanes_, 0.0f);
  std::fill(lse, lse + lanes_, kInfinity);
  const auto cached = static_cast<const T*>(p_.q_cache) + h * dim;
  const int64_t width = p_.num_heads * dim;
  int64_t lane = 0;
  for (const auto* rows : {&q_.window_rows, &q_.tracked_rows}) {
    for (const int64_t r : *rows) {
      pack_query(cached + p_.rows[r] * width, factor, dim, lanes_, query + lane);
      lse[lane++] = p_.lse[r * p_.num_heads + h] * kLog2E;
    }
  }
  for (const int64_t r : q_.tracked_rows) {
    const T* overwritten = static_cast<const T*>(p_.q_old) + r * width + h * dim;
    pack_query(overwritten, factor, dim, lanes_, query + lane++);
  }
}

// scores[k][lane] of one head; the old lanes as they were before the cache was written.
template <class T>
void DriftTask<T>::score_head(int64_t h, int64_t begin, int64_t n, const BlockBuffers& b) const {
  const int64_t dim = p_.head_dim, stride = p_.num_kv_heads * dim;
  const int64_t kv_head = h / (p_.num_heads / p_.num_kv_heads);
  const int64_t slot = q_.index * p_.capacity + q_.first_key + begin;
  const T* keys = static_cast<const T*>(p_.k_cache) + slot * stride + kv_head * dim;
  lane_product(w_.query + h * dim * lanes_, lanes_, lanes_ / kLanes,
               rows_operand(keys, stride, n, dim, b.keys), dim, n, nullptr, b.scores);
  if (q_.num_tracked() > 0) correct_old_lanes(h, begin, n, b);
}

template <class T>
void DriftTask<T>::correct_old_lanes(int64_t h, int64_t begin, int64_t n,
                                     const BlockBuffers& b) const {
  const int64_t dim = p_.head_dim, stride = p_.num_kv_heads * dim;
  const int64_t kv_head = h / (p_.num_heads / p_.num_kv_heads);
  const T* old_keys = static_cast<const T*>(p_.k_old) + kv_head * dim;
  int64_t at[kBlockKeys], count = 0;
  for (int64_t k = 0; k < n; ++k) {
    const int32_t row = q_.overwritten_by[static_cast<size_t>(begin + k)];
    if (row < 0) continue;
    copy_rows(old_keys + row * stride, stride, 1, dim, b.keys + count * dim);
    at[count++] = k;
  }
  if (count == 0) return;
  const int64_t first = q_.num_window() + q_.num_tracked(), aligned = first / kLanes * kLanes;
  lane_product(w_.query + h * dim * lanes_ + aligned, lanes_, (lanes_ - aligned) / kLanes,
               {b.keys, 1, dim}, dim, count, nullptr, b.corrected + aligned);
  for (int64_t i = 0; i < count; ++i) {
    const float* from = b.corrected + i * lanes_;
    std::copy(from + first, from + q_.num_lanes(), b.scores + at[i] * lanes_ + first);
  }
}

template <class T>
void DriftTask<T>::add_mass(const float* scores, int64_t h, int64_t n, float* mass) const {
  const float* lse = w_.lse + h * lanes_;
  const int64_t num_window = q_.num_window();
  for (int64_t lane = 0; lane < num_window; lane += kLanes) {
    const Int8 here = Int8{0, 1, 2, 3, 4, 5, 6, 7} + static_cast<int32_t>(lane);
    const Int8 is_window = here < static_cast<int32_t>(num_window);
    const Float8 log_sum = load8(lse + lane);
    for (int64_t k = 0; k < n; ++k) {
      const Float8 weight = exp2_flush(load8(scores + k * lanes_ + lane) - log_sum);
      float* at = mass + k * kLanes;
      store8(at, load8(at) + (is_window ? weight : Float8{}));
    }
  }
}

template <class T>
void DriftTask<T>::save_lanes(const float* scores, int64_t first, int64_t h, int64_t begin,
                              int64_t n, float* to) const {
  const int64_t padded = q_.padded_keys();
  for (int64_t i = 0; i < q_.num_tracked(); ++i) {
    float* row = to + (i * p_.num_heads + h) * padded + begin;
    for (int64_t k = 0; k < n; ++k) row[k] = scores[k * lanes_ + first + i];
  }
}

template <class T>
void DriftTask<T>::scan_block(int64_t block, const BlockBuffers& b) const {
  const int64_t begin = block * kBlockKeys, n = std::min(kBlockKeys, q_.num_keys - begin);
  std::fill(b.mass, b.mass + n * kLanes, 0.0f);
  for (int64_t h = 0; h < p_.num_heads; ++h) {
    score_head(h, begin, n, b);
    add_mass(b.scores, h, n, b.mass);
    if (q_.num_tracked() == 0) continue;
    save_lanes(b.scores, q_.num_window(), h, begin, n, w_.recent);
    save_lanes(b.scores, q_.num_window() + q_.num_tracked(), h, begin, n, w_.old);
  }
  float* mass = p_.mass + q_.index * p_.capacity + q_.first_key + begin;
  for (int64_t k = 0; k < n; ++k) mass[k] = sum(load8(b.mass + k * kLanes));
}

// Scores of one (tracked row, head) over all keys -> probabilities, old and new; zero in the
// padding.
template <class T>
void DriftTask<T>::normalise(int64_t tracked_head) const {
  const int64_t padded = q_.padded_keys();
  float* old = w_.old + tracked_head * padded;
  float* recent = w_.recent + tracked_head * padded;
  std::fill(old + q_.num_keys, old + padded, -kInfinity);
  std::fill(recent + q_.num_keys, recent + padded, -kInfinity);
  Float8 top = splat(-kInfinity), total = {};
  for (int64_t k = 0; k < padded; k += kLanes) top = max(load8(old + k), top);
  float best = top[0];
  for (int64_t lane = 1; lane < kLanes; ++lane) best = std::max(best, top[lane]);
  const int64_t i = tracked_head / p_.num_heads, h = tracked_head % p_.num_heads;
  const float log_sum = w_.lse[h * lanes_ + q_.num_window() + i];
  for (int64_t k = 0; k < padded; k += kLanes) {
    const Float8 weight = exp2_flush(load8(old + k) - best);
    total += weight;
    store8(old + k, weight);
    store8(recent + k, exp2_flush(load8(recent + k) - log_sum));
  }
  const float inverse = 1.0f / sum(total);
  for (int64_t k = 0; k < padded; k += kLanes) store8(old + k, load8(old + k) * inverse);
}

// |x|, at least 1e-8, given x . x
inline Float8 clamped_norm(Float8 square) { return max(splat(1e-8f), sqrt(square)); }

// Sum over keys of the cosine between old and new probabilities of one tracked row.
template <class T>
double DriftTask<T>::compare_row(int64_t tracked) const {
  const int64_t padded = q_.padded_keys(), first = tracked * p_.num_heads;
  for (int64_t h = 0; h < p_.num_heads; ++h) normalise(first + h);
  const float* old = w_.old + first * padded;
  const float* recent = w_.recent + first * padded;
  double total = 0.0;
  for (int64_t k = 0; k < padded; k += kLanes) {
    Float8 dot = {}, old_square = {}, recent_square = {};
    for (int64_t h = 0; h < p_.num_heads; ++h) {
      const Float8 a = load8(old + h * padded + k), b = load8(recent + h * padded + k);
      dot = multiply_add(a, b, dot);
      old_square = multiply_add(a, a, old_square);
      recent_square = multiply_add(b, b, recent_square);
    }
    const Float8 cosine = dot / (clamped_norm(old_square) * clamped_norm(recent_square));
    for (int64_t lane = 0; lane < kLanes; ++lane) total += double{cosine[lane]};
  }
  return total;
}

// All phases of one sequence; called by every thread of a parallel region, or by one alone.
template <class T>
void run_sequence(const DriftStatisticsParams& p, const Sequence& q, const Workspace& w,
                  const BlockBuffers& b) {
  const DriftTask<T> task(p, q, w);
#pragma omp for schedule(static)
  for (int64_t h = 0; h < p.num_heads; ++h) task.pack_head(h);
#pragma omp for schedule(static)
  for (int64_t block = 0; block < q.num_blocks(); ++block) task.scan_block(block, b);
#pragma omp for schedule(static)
  for (int64_t i = 0; i < q.num_tracked(); ++i) {
    w.cosines[q.first_tracked + i] = task.compare_row(i);
  }
}

double mean_cosine(const Sequence& q, const std::vector<double>& cosines) {
  if (q.num_tracked() == 0 || q.num_keys == 0) return std::numeric_limits<double>::infinity();
  double total = 0.0;
  for (int64_t i = 0; i < q.num_tracked(); ++i) {
    total += cosines[static_cast<size_t>(q.first_tracked + i)];
  }
  return total / static_cast<double>(q.num_tracked() * q.num_keys);
}

// Scratch large enough for any of the sequences (cosines: for all of them), in floats.
struct Sizes {
  int64_t lanes = 0;
  int64_t tracked = 0;
  int64_t cosines = 0;
  double nanoseconds = 0.0;
};

Sizes measure(const DriftStatisticsParams& p, const std::vector<Sequence>& sequences) {
  constexpr double kNanosecondsPerMultiplyAdd = 0.03;  // with AVX2, softmax included
  Sizes sizes;
  for (const Sequence& q : sequences) {
    sizes.lanes = std::max(sizes.lanes, q.lanes());
    sizes.tracked = std::max(sizes.tracked, q.num_tracked() * p.num_heads * q.padded_keys());
    sizes.cosines += q.num_tracked();
    sizes.nanoseconds += kNanosecondsPerMultiplyAdd *
                         static_cast<double>(q.lanes() * q.num_keys * p.num_heads * p.head_dim);
  }
  return sizes;
}

template <class T>
void run(const DriftStatisticsParams& p, const std::vector<Sequence>& sequences) {
  const Sizes sizes = measure(p, sequences);
  const int64_t lse = p.num_heads * sizes.lanes, query = lse * p.head_dim;
  const Scratch shared(query + lse + 2 * sizes.tracked);
  std::vector<double> cosines(static_cast<size_t>(sizes.cosines));
  float* memory = shared.data();
  const Workspace w{memory, memory + query, memory + query + lse,
                    memory + query + lse + sizes.tracked, cosines.data()};

  const int64_t scores = kBlockKeys * sizes.lanes, mass = kBlockKeys * kLanes;
  const int64_t keys = round_up(kBlockKeys * p.head_dim, 16), block = 2 * scores + keys + mass;
  const Scratch blocks(block * max_threads());
#pragma omp parallel if (is_worth_sharing(sizes.nanoseconds))
  {
    float* own = blocks.data() + thread_index() * block;
    const BlockBuffers b{own, own + scores, own + 2 * scores, own + 2 * scores + keys};
    for (const Sequence& q : sequences) run_sequence<T>(p, q, w, b);
  }
  for (const Sequence& q : sequences) p.similarity[q.index] = mean_cosine(q, cosines);
}

}  // namespace

void drift_statistics_cpu(const DriftStatisticsParams& params) {
  std::vector<Sequence> sequences;
  sequences.reserve(static_cast<size_t>(params.num_sequences));
  int64_t num_tracked = 0;
  for (int64_t s = 0; s < params.num_sequences; ++s) {
    sequences.push_back(describe(params, s, num_tracked));
    const Sequence& q = sequences.back();
    num_tracked += q.num_tracked();
    float* mass = params.mass + s * params.capacity;
    std::fill(mass, mass + q.first_key, 0.0f);
    std::fill(mass + q.first_key + q.num_keys, mass + params.capacity, 0.0f);
  }
  with_dtype(params.dtype, [&](auto zero) { run<decltype(zero)>(params, sequences); });
}

}  // namespace elastic_cache
