// The torch-free library by itself: every kernel is in it and does nothing on empty problems, and
// one pass select_rows -> token_confidence -> commit gives the exact values its headers promise.
#include <cstdint>
#include <cstdio>
#include <limits>
#include <vector>

#include "elastic_cache/add_rms_norm.h"
#include "elastic_cache/cache_write.h"
#include "elastic_cache/commit.h"
#include "elastic_cache/drift_attention.h"
#include "elastic_cache/drift_decision.h"
#include "elastic_cache/drift_statistics.h"
#include "elastic_cache/refresh_rows.h"
#include "elastic_cache/select_rows.h"
#include "elastic_cache/swiglu.h"
#include "elastic_cache/token_confidence.h"
#include "elastic_cache/window_attention.h"

namespace ec = elastic_cache;

namespace {

int num_failures = 0;

template <typename T>
void expect_equal(const char* what, const std::vector<T>& seen, const std::vector<T>& expected) {
  if (seen == expected) return;
  ++num_failures;
  std::printf("%s:\n  expected", what);
  for (const T& value : expected) std::printf(" %g", static_cast<double>(value));
  std::printf("\n  got     ");
  for (const T& value : seen) std::printf(" %g", static_cast<double>(value));
  std::printf("\n");
}

// Sizes of 0 with real widths; any read or write through a null pointer would crash.
void run_empty_problems() {
  ec::add_rms_norm_cpu({.num_rows = 0, .width = 8, .eps = 1e-5f});
  ec::cache_write_cpu(
      {.num_rows = 0, .num_heads = 2, .num_kv_heads = 1, .head_dim = 8, .capacity = 4});
  ec::window_attention_cpu(
      {.num_rows = 0, .num_heads = 2, .num_kv_heads = 1, .head_dim = 8, .capacity = 4});
  ec::drift_attention_cpu({.num_sequences = 0,
                           .num_rows = 0,
                           .num_heads = 2,
                           .num_kv_heads = 1,
                           .head_dim = 8,
                           .capacity = 4});
  ec::drift_statistics_cpu({.num_layers = 0, .num_sequences = 0, .head_dim = 8, .capacity = 4});
  ec::drift_decision_cpu({.num_sequences = 0, .capacity = 4, .track_num = 1, .num_layers = 1});
  ec::swiglu_cpu({.num_rows = 0, .width = 8});
  ec::token_confidence_cpu({.num_rows = 0, .vocab_size = 8});
  int32_t offset = -1;
  const bool fits = ec::refresh_rows_cpu({.num_sequences = 0, .capacity = 4, .offsets = &offset});
  expect_equal<int>("refresh_rows of no sequence", {fits, offset}, {1, 0});
}

// One sequence of 6 positions; 0 and 1 are known, 1 was committed just now, 0 is tracked.
void run_select_rows() {
  const bool masked[] = {false, false, true, true, true, true};
  const bool committed[] = {false, true, false, false, false, false};
  const int32_t tracked[] = {0}, window[] = {2}, lookahead[] = {1};
  std::vector<int32_t> rows(8), segments(ec::kSegmentColumns), window_rows(3);
  ec::SelectRowsParams params{.num_sequences = 1,
                              .capacity = 6,
                              .num_layers = 1,
                              .track_num = 1,
                              .max_rows = 8,
                              .max_window = 3,
                              .masked = masked,
                              .committed = committed,
                              .tracked = tracked,
                              .window = window,
                              .lookahead = lookahead,
                              .rows = rows.data(),
                              .segments = segments.data(),
                              .window_rows = window_rows.data()};
  expect_equal<int>("select_rows fits", {ec::select_rows_cpu(params)}, {1});
  expect_equal<int32_t>("rows", rows, {0, 1, 2, 3, 4, -1, -1, -1});
  expect_equal<int32_t>("segments", segments, {0, 1, 1, 2, 1});
  expect_equal<int32_t>("window_rows", window_rows, {2, 3, -1});
  params.max_rows = 4;
  expect_equal<int>("select_rows does not fit", {ec::select_rows_cpu(params)}, {0});
}

// Row 0 ties at its maximum: the lower id wins with probability 1/2. Row 1 is certain of 2.
void run_token_confidence(std::vector<int64_t>& token, std::vector<double>& confidence) {
  const float low = -std::numeric_limits<float>::infinity();
  const float logits[] = {low, 3.0f, 3.0f, low, low, 1.0f};
  ec::token_confidence_cpu({.dtype = ec::DType::kFloat32,
                            .num_rows = 2,
                            .vocab_size = 3,
                            .logits_row_stride = 3,
                            .logits = logits,
                            .token = token.data(),
                            .confidence = confidence.data()});
  expect_equal<int64_t>("token", token, {1, 2});
  expect_equal<double>("confidence", confidence, {0.5, 1.0});
}

// Candidates at positions 2 and 3. Position 3 becomes EOS (id 2): 4 and 5 are dropped with their
// tokens unchanged, 2 is not sure enough and stays masked.
void run_commit(const std::vector<int64_t>& token, const std::vector<double>& confidence) {
  const int32_t candidates[] = {2, 3}, rule[] = {static_cast<int32_t>(ec::CommitRule::kThreshold)};
  const int32_t key_range[] = {0, 6};
  const double amount[] = {0.9};
  bool masked[] = {false, false, true, true, true, true}, committed[6] = {};
  std::vector<int64_t> tokens{7, 7, 9, 9, 9, 9};
  std::vector<int32_t> eos_position{-1}, status(ec::kStatusColumns);
  ec::commit_cpu({.num_sequences = 1,
                  .capacity = 6,
                  .num_candidates = 2,
                  .eos_id = 2,
                  .token = token.data(),
                  .confidence = confidence.data(),
                  .candidates = candidates,
                  .rule = rule,
                  .amount = amount,
                  .key_range = key_range,
                  .tokens = tokens.data(),
                  .masked = masked,
                  .committed = committed,
                  .eos_position = eos_position.data(),
                  .status = status.data()});
  expect_equal<int64_t>("tokens", tokens, {7, 7, 9, 2, 9, 9});
  expect_equal<int>("masked", {masked, masked + 6}, {0, 0, 1, 0, 0, 0});
  expect_equal<int>("committed", {committed, committed + 6}, {0, 0, 0, 1, 0, 0});
  expect_equal<int32_t>("status", status, {1, 1, 3, 0});
  expect_equal<int32_t>("eos_position", eos_position, {3});
}

}  // namespace

int main() {
  run_empty_problems();
  run_select_rows();
  std::vector<int64_t> token(2);
  std::vector<double> confidence(2);
  run_token_confidence(token, confidence);
  run_commit(token, confidence);
  if (num_failures == 0) std::printf("all kernels as their headers say\n");
  return num_failures == 0 ? 0 : 1;
}
