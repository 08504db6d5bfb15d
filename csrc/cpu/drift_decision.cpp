// Turns the statistics of layers into the next rows and the first refreshed layer.
#include "elastic_cache/drift_decision.h"

#include <algorithm>

namespace elastic_cache {
namespace {

// A NaN ranks below every number, so that the order is total.
bool is_better(float a, float b) { return a > b || (b != b && a == a); }

// The k best positions of layer i, by insertion; scanning upwards, a tie stays behind the lower
// position.
void select_tracked(const DriftDecisionParams& p, int64_t i, int64_t s) {
  const float* mass = p.mass + (i * p.num_sequences + s) * p.capacity;
  const bool* masked = p.masked + s * p.capacity;
  int32_t* best = p.tracked + (i * p.num_sequences + s) * p.track_num;
  int64_t count = 0;
  for (int32_t k = p.key_range[2 * s]; k < p.key_range[2 * s + 1]; ++k) {
    if (masked[k]) continue;
    int64_t place = count;
    while (place > 0 && is_better(mass[k], mass[best[place - 1]])) --place;
    if (place == p.track_num) continue;
    count = std::min(count + 1, p.track_num);
    std::copy_backward(best + place, best + count - 1, best + count);
    best[place] = k;
  }
  std::fill(best + count, best + p.track_num, -1);
}

}  // namespace

void drift_decision_cpu(const DriftDecisionParams& params) {
  for (int64_t i = 0; i < params.num_layers; ++i) {
    const auto next = static_cast<int32_t>(params.layer + i + 1);
    for (int64_t s = 0; s < params.num_sequences; ++s) {
      if (params.similarity[i * params.num_sequences + s] < params.gamma[s]) {
        params.first_full_layer[s] = std::min(params.first_full_layer[s], next);
      }
      select_tracked(params, i, s);
    }
  }
}

}  // namespace elastic_cache
