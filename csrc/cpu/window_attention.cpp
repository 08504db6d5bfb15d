// Online softmax over blocks of keys; lanes are (row, query head) pairs that share a key/value head
// (see lane_product.h). A task is one key/value head and up to 24 lanes of one sequence.
// The subtle thing: scores are kept in base 2 (q is scaled by scale * log2 e when it is packed), so
// that the exponential is a bare 2^x; lse is converted back to base e at the end.
#include "elastic_cache/window_attention.h"

#include <cmath>
#include <limits>
#include <vector>

#include "lane_product.h"

namespace elastic_cache {
namespace {

constexpr double kLn2 = 0.69314718055994530942;
constexpr int64_t kMaxVectors = 3;  // of lanes, per task
// Scores and values of a block stay in a 32 KB first-level cache at D = 32 (7 KB + 9 KB).
constexpr int64_t kBlockKeys = 72;

// Lanes begin .. end - 1 of the lanes of a run of rows of one sequence.
struct Chunk {
  const int32_t* run;  // indices of the run's rows
  int64_t sequence;
  int64_t begin;
  int64_t end;
};

struct Plan {
  std::vector<int32_t> valid_rows;
  std::vector<Chunk> chunks;
  double num_scores = 0.0;  // per key/value head
};

// Memory of one thread.
struct Workspace {
  float* query;   // [D, lanes]
  float* scores;  // [keys of a block, lanes]
  float* output;  // [D, lanes]
  float* keys;    // [keys of a block, D]
  float* values;  // [keys of a block, D]

  static int64_t size(int64_t dim) {
    return (2 * dim + kBlockKeys) * kMaxVectors * kLanes + 2 * kBlockKeys * dim;
  }
  Workspace(float* memory, int64_t dim)
      : query(memory),
        scores(query + dim * kMaxVectors * kLanes),
        output(scores + kBlockKeys * kMaxVectors * kLanes),
        keys(output + dim * kMaxVectors * kLanes),
        values(keys + kBlockKeys * dim) {}
};

// Running maximum and sum of a task's lanes.
struct Softmax {
  Float8 max[kMaxVectors];
  Float8 sum[kMaxVectors];
};

// scores -> 2^(scores - max); `rescale` is what earlier blocks have to be multiplied with.
template <int NV>
void update_softmax(float* scores, int64_t num_keys, Softmax& state, Float8* rescale) {
  constexpr int64_t kStride = NV * kLanes;
  Float8 top[NV], total[NV] = {};
  for (int v = 0; v < NV; ++v) top[v] = state.max[v];
  for (int64_t k = 0; k < num_keys; ++k) {
    for (int v = 0; v < NV; ++v) top[v] = max(load8(scores + k * kStride + v * kLanes), top[v]);
  }
  for (int64_t k = 0; k < num_keys; ++k) {
    for (int v = 0; v < NV; ++v) {
      float* at = scores + k * kStride + v * kLanes;
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

template <class T, int NV>
void attend(const T* keys, const T* values, int64_t stride, int64_t num_keys, int64_t dim,
            const Workspace& w, Softmax& state) {
  constexpr int64_t kStride = NV * kLanes;
  for (int v = 0; v < NV; ++v) {
    state.max[v] = splat(-std::numeric_limits<float>::infinity());
    state.sum[v] = Float8{};
  }
  std::fill(w.output, w.output + dim * kStride, 0.0f);
  for (int64_t begin = 0; begin < num_keys; begin += kBlockKeys) {
    const int64_t n = std::min(kBlockKeys, num_keys - begin);
    const int64_t next = begin + n;
    prefetch_rows(values + begin * stride, stride, n, dim);
    const Operand k = rows_operand(keys + begin * stride, stride, n, dim, w.keys);
    Float8 rescale[NV];
    product_columns<NV>(w.query, kStride, k, dim, n, nullptr, w.scores);
    update_softmax<NV>(w.scores, n, state, rescale);
    prefetch_rows(keys + next * stride, stride, std::min(kBlockKeys, num_keys - next), dim);
    copy_rows(values + begin * stride, stride, n, dim, w.values);
    product_columns<NV>(w.scores, kStride, {w.values, dim, 1}, n, dim, rescale, w.output);
  }
}

template <class T>
void run_task(const WindowAttentionParams& p, const Chunk& chunk, int64_t kv_head,
              const Workspace& w) {
  const int64_t dim = p.head_dim, group = p.num_heads / p.num_kv_heads;
  const int64_t num_lanes = chunk.end - chunk.begin;
  const int64_t num_vectors = round_up(num_lanes, kLanes) / kLanes, lanes = num_vectors * kLanes;
  // Lane -> offset of its row and head in a [rows, H] array.
  const auto offset = [&](int64_t lane, int64_t row) {
    return row * p.num_heads + kv_head * group + (chunk.begin + lane) % group;
  };
  const auto row_of = [&](int64_t lane) {
    return int64_t{chunk.run[(chunk.begin + lane) / group]};
  };

  const int64_t first = p.key_range[2 * chunk.sequence];
  const int64_t num_keys = std::max<int64_t>(p.key_range[2 * chunk.sequence + 1] - first, 0);
  const int64_t stride = p.num_kv_heads * dim;
  const int64_t start = (chunk.sequence * p.capacity + first) * stride + kv_head * dim;
  const T* keys = static_cast<const T*>(p.k_cache) + start;
  const T* values = static_cast<const T*>(p.v_cache) + start;
  prefetch_rows(keys, stride, std::min(kBlockKeys, num_keys), dim);

  std::fill(w.query, w.query + dim * lanes, 0.0f);
  const T* queries = static_cast<const T*>(p.q_cache);
  const auto factor = static_cast<float>(p.scale / kLn2);
  for (int64_t lane = 0; lane < num_lanes; ++lane) {
    const T* query = queries + offset(lane, p.rows[row_of(lane)]) * dim;
    pack_query(query, factor, dim, lanes, w.query + lane);
  }
  Softmax state;
  if (num_vectors == 3) attend<T, 3>(keys, values, stride, num_keys, dim, w, state);
  if (num_vectors == 2) attend<T, 2>(keys, values, stride, num_keys, dim, w, state);
  if (num_vectors == 1) attend<T, 1>(keys, values, stride, num_keys, dim, w, state);

  for (int64_t lane = 0; lane < num_lanes; ++lane) {
    const float max = state.max[lane / kLanes][lane % kLanes];
    const float sum = state.sum[lane / kLanes][lane % kLanes];
    const int64_t at = offset(lane, row_of(lane));
    const float inverse = num_keys > 0 ? 1.0f / sum : 0.0f;
    p.lse[at] = static_cast<float>(static_cast<double>(max) * kLn2 + std::log(double{sum}));
    T* out = static_cast<T*>(p.out) + at * dim;
    for (int64_t d = 0; d < dim; ++d) out[d] = from_float<T>(w.output[d * lanes + lane] * inverse);
  }
}

template <class T>
void clear_row(const WindowAttentionParams& p, int64_t row) {
  T* out = static_cast<T*>(p.out) + row * p.num_heads * p.head_dim;
  std::fill(out, out + p.num_heads * p.head_dim, T{});
  std::fill(p.lse + row * p.num_heads, p.lse + (row + 1) * p.num_heads, 0.0f);
}

// Runs of valid rows of one sequence, cut into chunks of `max_lanes`.
Plan make_plan(const WindowAttentionParams& p) {
  Plan plan;
  plan.valid_rows.reserve(static_cast<size_t>(p.num_rows));
  for (int64_t r = 0; r < p.num_rows; ++r) {
    if (p.rows[r] >= 0) plan.valid_rows.push_back(static_cast<int32_t>(r));
  }
  const int64_t group = p.num_heads / p.num_kv_heads;
  const auto num_valid = static_cast<int64_t>(plan.valid_rows.size());
  const auto sequence_of = [&](int64_t i) {
    return p.rows[plan.valid_rows[static_cast<size_t>(i)]] / p.capacity;
  };
  // Fewer lanes a task, if it takes that to give every thread one: results do not depend on it.
  int64_t max_lanes = kMaxVectors * kLanes;
  while (max_lanes > kLanes &&
         p.num_kv_heads * ((num_valid * group + max_lanes - 1) / max_lanes) < max_threads()) {
    max_lanes -= kLanes;
  }
  for (int64_t begin = 0, end = 0; begin < num_valid; begin = end) {
    const int64_t sequence = sequence_of(begin);
    while (end < num_valid && sequence_of(end) == sequence) ++end;
    const int64_t lanes = (end - begin) * group;
    for (int64_t lane = 0; lane < lanes; lane += max_lanes) {
      plan.chunks.push_back({plan.valid_rows.data() + begin, sequence, lane,
                             std::min(lane + max_lanes, lanes)});
    }
    const int32_t* range = p.key_range + 2 * sequence;
    plan.num_scores += static_cast<double>(lanes) * std::max(range[1] - range[0], 0);
  }
  return plan;
}

}  // namespace

void window_attention_cpu(const WindowAttentionParams& params) {
  // Both products and the softmax together, with AVX2.
  constexpr double kNanosecondsPerMultiplyAdd = 0.03;
  const Plan plan = make_plan(params);
  const auto num_chunks = static_cast<int64_t>(plan.chunks.size());
  const int64_t num_tasks = params.num_kv_heads * num_chunks, dim = params.head_dim;
  const double work = kNanosecondsPerMultiplyAdd * 2 * plan.num_scores *
                      static_cast<double>(params.num_kv_heads * dim);
  const int64_t size = Workspace::size(dim);
  const Scratch scratch(size * max_threads());
  with_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t row = 0; row < params.num_rows; ++row) {
      if (params.rows[row] < 0) clear_row<T>(params, row);
    }
#pragma omp parallel if (is_worth_sharing(work))
    {
      const Workspace w(scratch.data() + thread_index() * size, dim);
#pragma omp for schedule(static)
      for (int64_t task = 0; task < num_tasks; ++task) {
        const Chunk& chunk = plan.chunks[static_cast<size_t>(task % num_chunks)];
        run_task<T>(params, chunk, task / num_chunks, w);
      }
    }
  });
}

}  // namespace elastic_cache
