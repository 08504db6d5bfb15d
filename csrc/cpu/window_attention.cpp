// A task is one key/value head and up to 48 lanes of one sequence, swept over the keys
// (attention_sweep.h); lanes are the (row, query head) pairs that share the key/value head.
#include "elastic_cache/window_attention.h"

#include <vector>

#include "attention_sweep.h"

namespace elastic_cache {
namespace {

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

// Scores of a block are not needed after it.
struct PassingScores {
  LaneRows block;

  LaneRows block_scores(int64_t) const { return block; }
  void scored(int64_t, int64_t, const LaneRows&) const {}
  void weighted(int64_t) const {}
};

template <class T>
void run_task(const WindowAttentionParams& p, const Chunk& chunk, int64_t kv_head,
              SweepBuffers& w) {
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

  const auto cache = head_cache<T>(p, chunk.sequence, kv_head);
  std::fill(w.query, w.query + dim * lanes, 0.0f);
  const T* queries = static_cast<const T*>(p.q_cache);
  const auto factor = static_cast<float>(p.scale / kLn2);
  for (int64_t lane = 0; lane < num_lanes; ++lane) {
    const T* query = queries + offset(lane, p.rows[row_of(lane)]) * dim;
    pack_query(query, factor, dim, lanes, w.query + lane);
  }
  with_vectors(num_vectors, [&](auto vectors) {
    sweep_keys<vectors()>(cache, vectors(), w, PassingScores{{w.scores, lanes}});
  });
  for (int64_t lane = 0; lane < num_lanes; ++lane) {
    const int64_t at = offset(lane, row_of(lane));
    write_lane(w, lane, lanes, dim, cache.num_keys > 0, static_cast<T*>(p.out) + at * dim,
               p.lse + at);
  }
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
  const Plan plan = make_plan(params);
  const auto num_chunks = static_cast<int64_t>(plan.chunks.size());
  const int64_t num_tasks = params.num_kv_heads * num_chunks, dim = params.head_dim;
  const double work = kNanosecondsPerScoreElement * plan.num_scores *
                      static_cast<double>(params.num_kv_heads * dim);
  const int64_t size = SweepBuffers::size(dim);
  const Scratch scratch(size * max_threads());
  with_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    clear_skipped_rows<T>(params);
#pragma omp parallel if (is_worth_sharing(work))
    {
      SweepBuffers w(scratch.data() + thread_index() * size, dim);
#pragma omp for schedule(static)
      for (int64_t task = 0; task < num_tasks; ++task) {
        const Chunk& chunk = plan.chunks[static_cast<size_t>(task % num_chunks)];
        run_task<T>(params, chunk, task / num_chunks, w);
      }
    }
  });
}

}  // namespace elastic_cache
