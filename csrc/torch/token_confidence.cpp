// token_confidence: Tensor -> params -> kernel.
#include "elastic_cache/token_confidence.h"

#include "checks.h"
#include "launch.h"
#include "ops.h"

namespace elastic_cache::ops {

void token_confidence(const Tensor& logits, const std::optional<Tensor>& noise, const Tensor& token,
                      const Tensor& confidence) {
  const Checks check("token_confidence", {{"logits", logits, Type::kModel, Memory::kRows},
                                          {"noise", noise, Type::kFloat64},
                                          {"token", token, Type::kInt64},
                                          {"confidence", confidence, Type::kFloat64}});
  check.shape("logits", logits, {{"rows"}, {"vocabulary"}});
  const int64_t num_rows = logits.size(0), vocab_size = logits.size(1);
  check.shape("noise", noise, {{"rows", num_rows}, {"vocabulary", vocab_size}});
  check.shape("token", token, {{"rows", num_rows}});
  check.shape("confidence", confidence, {{"rows", num_rows}});
  check.that(vocab_size >= 1, "logits must have at least one column, got 0");

  const TokenConfidenceParams params{.dtype = check.dtype(),
                                     .num_rows = num_rows,
                                     .vocab_size = vocab_size,
                                     .logits_row_stride = logits.stride(0),
                                     .logits = input<void>(logits),
                                     .noise = input<double>(noise),
                                     .token = output<int64_t>(token),
                                     .confidence = output<double>(confidence)};
  ELASTIC_CACHE_LAUNCH_WITH_WORKSPACE(token_confidence, logits, params);
}

}  // namespace elastic_cache::ops
