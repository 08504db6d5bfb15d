// commit: Tensor -> params -> kernel.
#include "elastic_cache/commit.h"

#include "checks.h"
#include "launch.h"
#include "ops.h"

namespace elastic_cache::ops {
namespace {

void check_rules(const Checks& check, const Tensor& rule) {
  if (!rule.is_cpu()) return;
  const int32_t* values = input<int32_t>(rule);
  for (int64_t s = 0; s < rule.size(0); ++s) {
    check.that(values[s] >= 0 && values[s] <= static_cast<int32_t>(CommitRule::kFactor),
               "rule must be 0 (threshold), 1 (top k) or 2 (factor), got ", values[s],
               " for sequence ", s);
  }
}

}  // namespace

void commit(const Tensor& token, const Tensor& confidence, const Tensor& candidates,
            const Tensor& rule, const Tensor& amount, const Tensor& key_range, int64_t eos_id,
            const std::optional<Tensor>& first_full_layer, int64_t num_layers, const Tensor& tokens,
            const Tensor& masked, const Tensor& committed, const Tensor& eos_position,
            const Tensor& status) {
  const Checks check("commit", {{"token", token, Type::kInt64},
                                {"confidence", confidence, Type::kFloat64},
                                {"candidates", candidates, Type::kInt32},
                                {"rule", rule, Type::kInt32},
                                {"amount", amount, Type::kFloat64},
                                {"key_range", key_range, Type::kInt32},
                                {"first_full_layer", first_full_layer, Type::kInt32},
                                {"tokens", tokens, Type::kInt64},
                                {"masked", masked, Type::kBool},
                                {"committed", committed, Type::kBool},
                                {"eos_position", eos_position, Type::kInt32},
                                {"status", status, Type::kInt32}});
  check.shape("candidates", candidates, {{"candidates"}});
  const int64_t num_candidates = candidates.size(0);
  check.shape("token", token, {{"candidates", num_candidates}});
  check.shape("confidence", confidence, {{"candidates", num_candidates}});
  check.shape("tokens", tokens, {{"sequences"}, {"capacity"}});
  const int64_t num_sequences = tokens.size(0), capacity = tokens.size(1);
  check.shape("masked", masked, {{"sequences", num_sequences}, {"capacity", capacity}});
  check.shape("committed", committed, {{"sequences", num_sequences}, {"capacity", capacity}});
  check.shape("rule", rule, {{"sequences", num_sequences}});
  check.shape("amount", amount, {{"sequences", num_sequences}});
  check.shape("key_range", key_range, {{"sequences", num_sequences}, {"2", 2}});
  check.shape("first_full_layer", first_full_layer, {{"sequences", num_sequences}});
  check.shape("eos_position", eos_position, {{"sequences", num_sequences}});
  check.shape("status", status, {{"sequences", num_sequences}, {"status columns", kStatusColumns}});

  check.indices("candidates", candidates, num_sequences * capacity);
  check.key_range(key_range, capacity);
  check_rules(check, rule);
  ELASTIC_CACHE_LAUNCH(commit, tokens,
                       {.num_sequences = num_sequences,
                        .capacity = capacity,
                        .num_candidates = num_candidates,
                        .eos_id = eos_id,
                        .num_layers = num_layers,
                        .token = input<int64_t>(token),
                        .confidence = input<double>(confidence),
                        .candidates = input<int32_t>(candidates),
                        .rule = input<int32_t>(rule),
                        .amount = input<double>(amount),
                        .key_range = input<int32_t>(key_range),
                        .first_full_layer = input<int32_t>(first_full_layer),
                        .tokens = output<int64_t>(tokens),
                        .masked = output<bool>(masked),
                        .committed = output<bool>(committed),
                        .eos_position = output<int32_t>(eos_position),
                        .status = output<int32_t>(status)});
}

}  // namespace elastic_cache::ops
