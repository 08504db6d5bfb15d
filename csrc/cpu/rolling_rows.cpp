// Sorts the positions that are not computed anyway by how due they are, and takes the first ones.
#include "elastic_cache/rolling_rows.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <vector>

namespace elastic_cache {
namespace {

int32_t grown(int32_t due, int64_t distance, int64_t reach) {
  const int64_t sum = due + kDueUnit * reach / (reach + distance);
  return static_cast<int32_t>(std::min<int64_t>(sum, std::numeric_limits<int32_t>::max()));
}

void choose(const RollingRowsParams& p, int64_t s, std::vector<int32_t>& others) {
  const bool* masked = p.masked + s * p.capacity;
  const bool* committed = p.committed + s * p.capacity;
  int32_t* due = p.due + s * p.capacity;
  int32_t* chosen = p.chosen + s * p.max_chosen;
  const auto is_waiting = [&](int64_t i) { return masked[i] && !committed[i]; };
  const int64_t begin = p.key_range[2 * s], end = p.key_range[2 * s + 1];
  int64_t first = begin;
  while (first < end && !is_waiting(first)) ++first;

  others.clear();
  int64_t num_waiting = 0, num_computed = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t rank = num_waiting;
    num_waiting += is_waiting(i);
    const bool is_in_window = is_waiting(i) && rank < p.window[s];
    if (committed[i] || is_in_window) {
      ++num_computed;
      due[i] = committed[i] ? static_cast<int32_t>(p.repeats * kUrgent) : 0;
      continue;
    }
    due[i] = grown(due[i], std::abs(i - first), p.reach);
    if (is_waiting(i) && rank < p.window[s] + p.ahead) due[i] = std::max(due[i], kUrgent);
    others.push_back(static_cast<int32_t>(i));
  }
  const int64_t most = std::min<int64_t>(p.max_chosen, static_cast<int64_t>(others.size()));
  const int64_t budget = std::clamp<int64_t>(p.num_rows[s] - num_computed, 0, most);
  const auto last = others.begin() + budget;
  std::nth_element(others.begin(), last, others.end(), [&](int32_t a, int32_t b) {
    return due[a] != due[b] ? due[a] > due[b] : a < b;
  });
  std::sort(others.begin(), last);
  std::fill(std::copy(others.begin(), last, chosen), chosen + p.max_chosen, -1);
  for (auto i = others.begin(); i != last; ++i) {
    due[*i] = std::max(due[*i] / kUrgent - 1, 0) * kUrgent;
  }
}

}  // namespace

void rolling_rows_cpu(const RollingRowsParams& params) {
  std::vector<int32_t> others;
  others.reserve(static_cast<size_t>(params.capacity));
  for (int64_t s = 0; s < params.num_sequences; ++s) choose(params, s, others);
}

}  // namespace elastic_cache
