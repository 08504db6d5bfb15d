// drift_decision: Tensor -> params -> kernel.
#include "elastic_cache/drift_decision.h"

#include "checks.h"
#include "launch.h"
#include "ops.h"

namespace elastic_cache::ops {

void drift_decision(const Tensor& similarity, const Tensor& gamma, const Tensor& mass,
                    const Tensor& masked, const Tensor& key_range, int64_t layer,
                    const Tensor& first_full_layer, const Tensor& tracked) {
  const Checks check("drift_decision", {{"similarity", similarity, Type::kFloat64},
                                        {"gamma", gamma, Type::kFloat64},
                                        {"mass", mass, Type::kFloat32},
                                        {"masked", masked, Type::kBool},
                                        {"key_range", key_range, Type::kInt32},
                                        {"first_full_layer", first_full_layer, Type::kInt32},
                                        {"tracked", tracked, Type::kInt32}});
  check.shape("mass", mass, {{"layers"}, {"sequences"}, {"capacity"}});
  const int64_t num_layers = mass.size(0), num_sequences = mass.size(1), capacity = mass.size(2);
  check.shape("similarity", similarity, {{"layers", num_layers}, {"sequences", num_sequences}});
  check.shape("gamma", gamma, {{"sequences", num_sequences}});
  check.shape("masked", masked, {{"sequences", num_sequences}, {"capacity", capacity}});
  check.shape("key_range", key_range, {{"sequences", num_sequences}, {"2", 2}});
  check.shape("first_full_layer", first_full_layer, {{"sequences", num_sequences}});
  check.shape("tracked", tracked,
              {{"layers", num_layers}, {"sequences", num_sequences}, {"track_num"}});

  check.key_range(key_range, capacity);
  ELASTIC_CACHE_LAUNCH(drift_decision, mass,
                       {.num_sequences = num_sequences,
                        .capacity = capacity,
                        .track_num = tracked.size(2),
                        .num_layers = num_layers,
                        .layer = layer,
                        .similarity = input<double>(similarity),
                        .gamma = input<double>(gamma),
                        .mass = input<float>(mass),
                        .masked = input<bool>(masked),
                        .key_range = input<int32_t>(key_range),
                        .first_full_layer = output<int32_t>(first_full_layer),
                        .tracked = output<int32_t>(tracked)});
}

}  // namespace elastic_cache::ops
