// The kernels without torch: attention of a few window rows over a cache of random keys, compared
// with the loops of the definition. Everything is a raw pointer in a params struct.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "elastic_cache/window_attention.h"

namespace {

std::vector<float> random_values(int64_t size, std::mt19937& generator) {
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(size));
  for (float& value : values) value = normal(generator);
  return values;
}

// Largest difference between `p.out` and softmax(scale * q . K) V computed in double.
double largest_error(const elastic_cache::WindowAttentionParams& p) {
  const auto* q = static_cast<const float*>(p.q_cache);
  const auto* k = static_cast<const float*>(p.k_cache);
  const auto* v = static_cast<const float*>(p.v_cache);
  const auto* out = static_cast<const float*>(p.out);
  const int64_t d = p.head_dim, queries_per_kv = p.num_heads / p.num_kv_heads;
  double largest = 0;
  for (int64_t row = 0; row < p.num_rows; ++row) {
    for (int64_t head = 0; head < p.num_heads; ++head) {
      const float* query = q + (p.rows[row] * p.num_heads + head) * d;
      std::vector<double> sum(static_cast<size_t>(d), 0.0);
      double total = 0;
      for (int64_t key = p.key_range[0]; key < p.key_range[1]; ++key) {
        const int64_t offset = (key * p.num_kv_heads + head / queries_per_kv) * d;
        double score = 0;
        for (int64_t i = 0; i < d; ++i) score += double{query[i]} * k[offset + i];
        const double weight = std::exp(p.scale * score);
        total += weight;
        for (int64_t i = 0; i < d; ++i) sum[i] += weight * v[offset + i];
      }
      for (int64_t i = 0; i < d; ++i) {
        const double seen = out[(row * p.num_heads + head) * d + i];
        largest = std::max(largest, std::abs(sum[i] / total - seen));
      }
    }
  }
  return largest;
}

}  // namespace

int main() {
  const int64_t capacity = 512, heads = 8, kv_heads = 2, head_dim = 64;
  std::mt19937 generator(1);
  const auto q = random_values(capacity * heads * head_dim, generator);
  const auto k = random_values(capacity * kv_heads * head_dim, generator);
  const auto v = random_values(capacity * kv_heads * head_dim, generator);

  std::vector<int32_t> rows;  // a window need not be a block: every third position from 100 on
  for (int32_t i = 0; i < 16; ++i) rows.push_back(100 + 3 * i);
  const std::vector<int32_t> key_range{0, 400};  // the sequence is shorter than its capacity

  const auto num_rows = static_cast<int64_t>(rows.size());
  std::vector<float> out(static_cast<size_t>(num_rows * heads * head_dim));
  std::vector<float> lse(static_cast<size_t>(num_rows * heads));

  const elastic_cache::WindowAttentionParams params{
      .dtype = elastic_cache::DType::kFloat32,
      .num_rows = num_rows,
      .num_heads = heads,
      .num_kv_heads = kv_heads,
      .head_dim = head_dim,
      .capacity = capacity,
      .scale = 1.0f / std::sqrt(static_cast<float>(head_dim)),
      .q_cache = q.data(),
      .k_cache = k.data(),
      .v_cache = v.data(),
      .rows = rows.data(),
      .key_range = key_range.data(),
      .out = out.data(),
      .lse = lse.data(),
  };

  double best_us = 1e30;
  for (int repeat = 0; repeat < 20; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    elastic_cache::window_attention_cpu(params);
    const std::chrono::duration<double, std::micro> us = std::chrono::steady_clock::now() - start;
    best_us = std::min(best_us, us.count());
  }

  const double error = largest_error(params);
  std::printf("window_attention: %lld rows x %lld heads over %d keys in %.0f us, error %.1e\n",
              static_cast<long long>(num_rows), static_cast<long long>(heads), key_range[1],
              best_us, error);
  return error < 1e-5 ? 0 : 1;
}
