// Sorts the positions that are not computed anyway by age, and takes the oldest.
#include "elastic_cache/rolling_rows.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace elastic_cache {
namespace {

void choose(const RollingRowsParams& p, int64_t s, std::vector<int32_t>& others) {
  const bool* masked = p.masked + s * p.capacity;
  const bool* committed = p.committed + s * p.capacity;
  int32_t* age = p.age + s * p.capacity;
  int32_t* chosen = p.chosen + s * p.max_chosen;
  others.clear();
  int64_t num_waiting = 0, num_computed = 0;
  for (int64_t i = p.key_range[2 * s]; i < p.key_range[2 * s + 1]; ++i) {
    const bool is_waiting = masked[i] && !committed[i];
    const bool is_computed = committed[i] || (is_waiting && num_waiting < p.window[s]);
    num_waiting += is_waiting;
    num_computed += is_computed;
    if (!is_computed) others.push_back(static_cast<int32_t>(i));
    if (is_computed) {
      age[i] = 0;
    } else if (age[i] < std::numeric_limits<int32_t>::max()) {
      ++age[i];
    }
  }
  const int64_t most = std::min<int64_t>(p.max_chosen, static_cast<int64_t>(others.size()));
  const int64_t budget = std::clamp<int64_t>(p.num_rows[s] - num_computed, 0, most);
  const auto end = others.begin() + budget;
  std::nth_element(others.begin(), end, others.end(), [&](int32_t a, int32_t b) {
    return age[a] != age[b] ? age[a] > age[b] : a < b;
  });
  std::sort(others.begin(), end);
  std::fill(std::copy(others.begin(), end, chosen), chosen + p.max_chosen, -1);
  for (auto i = others.begin(); i != end; ++i) age[*i] = 0;
}

}  // namespace

void rolling_rows_cpu(const RollingRowsParams& params) {
  std::vector<int32_t> others;
  others.reserve(static_cast<size_t>(params.capacity));
  for (int64_t s = 0; s < params.num_sequences; ++s) choose(params, s, others);
}

}  // namespace elastic_cache
