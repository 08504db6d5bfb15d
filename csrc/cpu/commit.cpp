// Commits one sequence at a time; see the header for the rules.
#include "elastic_cache/commit.h"

#include <algorithm>
#include <vector>

namespace elastic_cache {
namespace {

struct Candidate {
  double confidence;
  int64_t token;
  int64_t position;
};

// The candidates of sequence s that may be committed, in the order given.
void collect(const CommitParams& p, int64_t s, std::vector<Candidate>& found) {
  found.clear();
  for (int64_t i = 0; i < p.num_candidates; ++i) {
    const int64_t slot = p.candidates[i];
    if (slot < 0 || slot / p.capacity != s || !p.masked[slot]) continue;
    const int64_t position = slot % p.capacity;
    if (position < p.key_range[2 * s] || position >= p.key_range[2 * s + 1]) continue;
    found.push_back({p.confidence[i], p.token[i], position});
  }
}

// Whether the rank-th best candidate (from 1, the best is always accepted) is committed.
bool is_accepted(CommitRule rule, double amount, double best, double confidence, int64_t rank) {
  if (rank == 1) return true;
  switch (rule) {
    case CommitRule::kThreshold: return confidence >= std::min(amount, best);
    case CommitRule::kTopK: return static_cast<double>(rank) <= amount;
    case CommitRule::kFactor: return confidence >= 1.0 - amount / static_cast<double>(rank + 1);
  }
  return false;
}

// Commits the accepted candidates, best first; returns the leftmost new EOS, or -1.
int64_t commit_candidates(const CommitParams& p, int64_t s, std::vector<Candidate>& found) {
  std::sort(found.begin(), found.end(), [](const Candidate& a, const Candidate& b) {
    return a.confidence > b.confidence || (a.confidence == b.confidence && a.position < b.position);
  });
  const auto rule = static_cast<CommitRule>(p.rule[s]);
  int64_t rank = 0, eos = -1;
  for (const Candidate& c : found) {
    if (!is_accepted(rule, p.amount[s], found.front().confidence, c.confidence, ++rank)) break;
    const int64_t slot = s * p.capacity + c.position;
    p.tokens[slot] = c.token;
    p.masked[slot] = false;
    p.committed[slot] = true;
    if (c.token == p.eos_id && (eos < 0 || c.position < eos)) eos = c.position;
  }
  return eos;
}

void commit_sequence(const CommitParams& p, int64_t s, std::vector<Candidate>& found) {
  bool* masked = p.masked + s * p.capacity;
  bool* committed = p.committed + s * p.capacity;
  const int64_t begin = p.key_range[2 * s], end = p.key_range[2 * s + 1];
  std::fill(committed, committed + p.capacity, false);

  collect(p, s, found);
  const auto not_finite = std::count_if(
      found.begin(), found.end(), [](const Candidate& c) { return c.confidence != c.confidence; });
  if (not_finite == 0) {
    const int64_t eos = commit_candidates(p, s, found);
    if (p.eos_id >= 0 && eos >= 0 && p.eos_position[s] < 0) {
      std::fill(masked + eos + 1, masked + end, false);
      p.eos_position[s] = static_cast<int32_t>(eos);
    }
  }
  int32_t* status = p.status + s * kStatusColumns;
  status[kStatusCommitted] =
      static_cast<int32_t>(std::count(committed, committed + p.capacity, true));
  status[kStatusMasked] =
      begin < end ? static_cast<int32_t>(std::count(masked + begin, masked + end, true)) : 0;
  status[kStatusEosPosition] = p.eos_position[s];
  status[kStatusNotFinite] = static_cast<int32_t>(not_finite);
}

}  // namespace

void commit_cpu(const CommitParams& params) {
  std::vector<Candidate> found;
  found.reserve(static_cast<size_t>(params.num_candidates));
  for (int64_t s = 0; s < params.num_sequences; ++s) {
    const bool is_stopped =
        params.first_full_layer && params.first_full_layer[s] < params.num_layers;
    if (!is_stopped) commit_sequence(params, s, found);
  }
}

}  // namespace elastic_cache
