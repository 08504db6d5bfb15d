// A task is up to four key/value heads and 48 lanes of one sequence, swept over the keys
// (attention_sweep.h); lanes are the (row, query head) pairs that share the key/value head.
#include "elastic_cache/window_attention.h"

#include <array>
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

// Up to kMaxHeads key/value heads of a task.
struct Heads {
  int64_t begin;
  int64_t end;
};

// The lanes of one head of a task.
template <class T>
class HeadLanes {
 public:
  HeadLanes(const WindowAttentionParams& p, const Chunk& chunk, int64_t kv_head)
      : p_(p),
        chunk_(chunk),
        kv_head_(kv_head),
        group_(p.num_heads / p.num_kv_heads),
        width_(round_up(chunk.end - chunk.begin, kLanes)) {}

  void pack(float* to) const {
    std::fill(to, to + p_.head_dim * width_, 0.0f);
    const T* queries = static_cast<const T*>(p_.q_cache);
    const auto factor = static_cast<float>(p_.scale / kLn2);
    for (int64_t lane = 0; lane < chunk_.end - chunk_.begin; ++lane) {
      const T* query = queries + offset(lane, p_.rows[row_of(lane)]) * p_.head_dim;
      pack_query(query, factor, p_.head_dim, width_, to + lane);
    }
  }

  void write(const SweepBuffers& w, bool has_keys) const {
    for (int64_t lane = 0; lane < chunk_.end - chunk_.begin; ++lane) {
      const int64_t at = offset(lane, row_of(lane));
      write_lane(w, lane, width_, p_.head_dim, has_keys, static_cast<T*>(p_.out) + at * p_.head_dim,
                 p_.lse + at);
    }
  }

 private:
  // Lane -> offset of its row and head in a [rows, H] array.
  int64_t offset(int64_t lane, int64_t row) const {
    return row * p_.num_heads + kv_head_ * group_ + (chunk_.begin + lane) % group_;
  }
  int64_t row_of(int64_t lane) const { return chunk_.run[(chunk_.begin + lane) / group_]; }

  const WindowAttentionParams& p_;
  const Chunk& chunk_;
  int64_t kv_head_;
  int64_t group_;
  int64_t width_;
};

template <class T>
void run_task(const WindowAttentionParams& p, const Chunk& chunk, Heads heads,
              const HeadCache<T>& following, float* memory) {
  const int64_t num_heads = heads.end - heads.begin, dim = p.head_dim;
  const int64_t num_vectors = round_up(chunk.end - chunk.begin, kLanes) / kLanes;
  auto w = task_buffers(memory, dim);
  std::array<HeadCache<T>, kMaxHeads> cache{};
  std::array<PassingScores, kMaxHeads> scores{};
  for (int64_t h = 0; h < num_heads; ++h) {
    cache[h] = head_cache<T>(p, chunk.sequence, heads.begin + h);
    scores[h] = {{w[h].scores, num_vectors * kLanes}};
    HeadLanes<T>(p, chunk, heads.begin + h).pack(w[h].query);
  }
  with_vectors(num_vectors, [&](auto vectors) {
    sweep_heads<vectors()>(num_heads, cache.data(), following, vectors(), w.data(), scores.data());
  });
  for (int64_t h = 0; h < num_heads; ++h) {
    HeadLanes<T>(p, chunk, heads.begin + h).write(w[h], cache[h].num_keys > 0);
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
      plan.chunks.push_back(
          {plan.valid_rows.data() + begin, sequence, lane, std::min(lane + max_lanes, lanes)});
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
  const int64_t dim = params.head_dim, num_kv_heads = params.num_kv_heads;
  const int64_t per_task = heads_per_task(num_chunks, num_kv_heads, max_threads());
  const int64_t num_groups = per_task == 0 ? 0 : (num_kv_heads + per_task - 1) / per_task;
  const int64_t num_tasks = num_chunks * num_groups;
  const double work =
      kNanosecondsPerScoreElement * plan.num_scores * static_cast<double>(num_kv_heads * dim);
  const int64_t size = SweepBuffers::size(dim);
  const Scratch scratch(size * max_threads());
  with_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    clear_skipped_rows<T>(params);
    const auto chunk_of = [&](int64_t task) -> const Chunk& {
      return plan.chunks[static_cast<size_t>(task / num_groups)];
    };
    const auto first_head = [&](int64_t task) { return task % num_groups * per_task; };
#pragma omp parallel for schedule(static) if (is_worth_sharing(work))
    for (int64_t task = 0; task < num_tasks; ++task) {
      const int64_t first = first_head(task), next = task + 1;
      const Heads heads{first, std::min(first + per_task, num_kv_heads)};
      HeadCache<T> following{};
      if (next < num_tasks) {
        following = head_cache<T>(params, chunk_of(next).sequence, first_head(next));
      }
      run_task<T>(params, chunk_of(task), heads, following, scratch.data() + thread_index() * size);
    }
  });
}

}  // namespace elastic_cache
