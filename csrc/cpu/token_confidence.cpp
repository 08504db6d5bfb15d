// Two passes over a row: the maximum and the best token, then the sum of exponentials in double.
// The subtle thing: the exponentials too are evaluated in double, so that the confidence does not
// depend on how a float exponential is approximated and a threshold is met by exactly the same
// tokens as with a float64 softmax.
#include "elastic_cache/token_confidence.h"

#include <cmath>
#include <limits>

#include "common.h"

namespace elastic_cache {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Best {
  float max = -kInfinity;
  int64_t token = 0;       // lowest index of the maximum
  bool is_finite = true;   // no NaN and no +inf (-inf is allowed: a token ruled out)
};

template <class T>
Best find_best(const T* logits, int64_t size) {
  Best best;
  int64_t i = 0;
  if (size >= kLanes) {
    Float8 top = splat(-kInfinity);
    Int8 where = {0, 1, 2, 3, 4, 5, 6, 7}, here = where, finite = ~Int8{};
    for (; i + kLanes <= size; i += kLanes, here += static_cast<int32_t>(kLanes)) {
      const Float8 x = load8(logits + i);
      const Int8 greater = x > top;
      finite &= x < kInfinity;
      top = greater ? x : top;
      where = greater ? here : where;
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      best.is_finite &= finite[lane] != 0;
      if (top[lane] > best.max || (top[lane] == best.max && where[lane] < best.token)) {
        best.max = top[lane];
        best.token = where[lane];
      }
    }
  }
  for (; i < size; ++i) {
    const float x = to_float(logits[i]);
    best.is_finite &= x < kInfinity;
    if (x > best.max) {
      best.max = x;
      best.token = i;
    }
  }
  return best;
}

template <class T>
double sum_of_exponentials(const T* logits, int64_t size, double max) {
  Double4 low = {}, high = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Float8 x = load8(logits + i);
    const Float4 first = {x[0], x[1], x[2], x[3]}, second = {x[4], x[5], x[6], x[7]};
    low += exp_nonpositive(__builtin_convertvector(first, Double4) - max);
    high += exp_nonpositive(__builtin_convertvector(second, Double4) - max);
  }
  double total = sum(low + high);
  for (; i < size; ++i) total += std::exp(static_cast<double>(to_float(logits[i])) - max);
  return total;
}

template <class T>
int64_t argmax_with_noise(const T* logits, const double* noise, int64_t size) {
  int64_t token = 0;
  double best = -std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < size; ++i) {
    const double x = static_cast<double>(to_float(logits[i])) + noise[i];
    if (x > best) {
      best = x;
      token = i;
    }
  }
  return token;
}

template <class T>
void confidence_of_row(const TokenConfidenceParams& p, int64_t row) {
  const T* logits = static_cast<const T*>(p.logits) + row * p.logits_row_stride;
  const Best best = find_best(logits, p.vocab_size);
  // All logits -inf: no distribution, and no maximum to subtract.
  if (!best.is_finite || best.max == -kInfinity) {
    p.token[row] = 0;
    p.confidence[row] = std::numeric_limits<double>::quiet_NaN();
    return;
  }
  const int64_t token =
      p.noise ? argmax_with_noise(logits, p.noise + row * p.vocab_size, p.vocab_size) : best.token;
  const double max = best.max;
  p.token[row] = token;
  p.confidence[row] = std::exp(static_cast<double>(to_float(logits[token])) - max) /
                      sum_of_exponentials(logits, p.vocab_size, max);
}

}  // namespace

void token_confidence_cpu(const TokenConfidenceParams& params) {
  constexpr double kNanosecondsPerLogit = 1.5;
  with_dtype(params.dtype, [&](auto zero) {
    parallel_for(params.num_rows, kNanosecondsPerLogit * static_cast<double>(params.vocab_size),
                 [&](int64_t row) { confidence_of_row<decltype(zero)>(params, row); });
  });
}

}  // namespace elastic_cache
