// Cases of attention_probe.cu, laid the way a step lays them, and both operators in float64.
#pragma once

#include <cuda_bf16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "elastic_cache/types.h"

namespace elastic_cache::probe {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();
inline constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

inline uint64_t random_state = 1;
inline double uniform() {  // splitmix64
  uint64_t z = random_state += 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}
inline double normal() {
  return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307179586 * uniform());
}

inline double round_to(DType dtype, double x) {
  return dtype == DType::kBFloat16 ? __bfloat162float(__double2bfloat16(x)) : static_cast<float>(x);
}

struct Sequence {
  int tracked, committed, window, lookahead;
  int first_key, end_key;
  int num_rows() const { return tracked + committed + window + lookahead; }
};

struct Shape {
  DType dtype;
  int heads, kv_heads, dim;
  std::vector<Sequence> sequences;
  int padding = 0;     // rows of -1 at the end
  int skip_every = 0;  // every so many-th row is -1
};

struct Case {
  Shape shape;
  int capacity = 0;
  std::vector<int32_t> rows, segments, key_range;
  std::vector<double> q, k, v, q_old, k_old;

  int num_rows() const { return static_cast<int>(rows.size()); }
  int num_sequences() const { return static_cast<int>(shape.sequences.size()); }
};

// Rows are at random distinct positions, in and out of the key range.
inline void lay_rows(Case& c) {
  for (int s = 0; s < c.num_sequences(); ++s) {
    const Sequence& q = c.shape.sequences[s];
    c.segments.insert(c.segments.end(),
                      {c.num_rows(), q.tracked, q.committed, q.window, q.lookahead});
    c.key_range.insert(c.key_range.end(), {q.first_key, q.end_key});
    std::vector<int> positions(c.capacity);
    for (int i = 0; i < c.capacity; ++i) positions[i] = i;
    for (int i = 0; i < q.num_rows(); ++i) {
      std::swap(positions[i], positions[i + static_cast<int>(uniform() * (c.capacity - i))]);
      const bool is_skipped = c.shape.skip_every > 0 && i % c.shape.skip_every == 1;
      c.rows.push_back(is_skipped ? -1 : s * c.capacity + positions[i]);
    }
  }
  c.rows.insert(c.rows.end(), c.shape.padding, -1);
}

inline void fill(std::vector<double>& x, size_t at, size_t count, double value) {
  std::fill(x.begin() + static_cast<std::ptrdiff_t>(at),
            x.begin() + static_cast<std::ptrdiff_t>(at + count), value);
}

inline Case make_case(const Shape& shape) {
  Case c{shape, 0, {}, {}, {}, {}, {}, {}, {}, {}};
  for (const Sequence& q : shape.sequences) {
    c.capacity = std::max({c.capacity, q.end_key + 2, q.num_rows() + 2});
  }
  lay_rows(c);
  const size_t slots = static_cast<size_t>(c.capacity) * c.shape.sequences.size();
  const size_t q_width = static_cast<size_t>(shape.heads) * shape.dim;
  const size_t k_width = static_cast<size_t>(shape.kv_heads) * shape.dim;
  c.q.assign(slots * q_width, kNan);
  c.k.resize(slots * k_width);
  c.v.resize(slots * k_width);
  c.q_old.assign(c.rows.size() * q_width, kNan);
  c.k_old.assign(c.rows.size() * k_width, kNan);
  for (auto* x : {&c.k, &c.v}) std::generate(x->begin(), x->end(), normal);
  for (size_t r = 0; r < c.rows.size(); ++r) {
    if (c.rows[r] < 0) continue;
    const size_t slot = static_cast<size_t>(c.rows[r]);
    const int32_t* segment = &c.segments[slot / c.capacity * kSegmentColumns];
    const bool is_tracked = static_cast<int>(r) < segment[kSegmentBegin] + segment[kSegmentTracked];
    for (size_t i = 0; i < q_width; ++i) {
      c.q[slot * q_width + i] = 2 * normal();
      if (is_tracked) c.q_old[r * q_width + i] = c.q[slot * q_width + i] + normal();
    }
    for (size_t i = 0; i < k_width && segment[kSegmentTracked] > 0; ++i) {
      c.k_old[r * k_width + i] = c.k[slot * k_width + i] + normal();
    }
  }
  for (size_t slot = 0; slot < slots; ++slot) {
    const Sequence& q = shape.sequences[slot / c.capacity];
    const int position = static_cast<int>(slot % c.capacity);
    if (position >= q.first_key && position < q.end_key) continue;
    for (auto* x : {&c.k, &c.v}) fill(*x, slot * k_width, k_width, kNan);
    for (size_t r = 0; r < c.rows.size(); ++r) {
      if (c.rows[r] == static_cast<int>(slot)) fill(c.k_old, r * k_width, k_width, kNan);
    }
  }
  return c;
}

struct Result {
  std::vector<double> out, lse, mass, similarity;
  double largest_score = 1.0;
};

// Softmax over the keys of sequence s of a query of head h -> weights; returns lse.
inline double softmax(const Case& c, int s, int h, const double* query,
                      const std::vector<int>& old_row, std::vector<double>& weights,
                      double& largest) {
  const Shape& shape = c.shape;
  const int kv_head = h / (shape.heads / shape.kv_heads);
  double top = -kInfinity, sum = 0.0;
  for (int key = shape.sequences[s].first_key; key < shape.sequences[s].end_key; ++key) {
    const int row = old_row.empty() ? -1 : old_row[key];
    const size_t at = row >= 0 ? row : static_cast<size_t>(s) * c.capacity + key;
    const std::vector<double>& keys = row >= 0 ? c.k_old : c.k;
    const double* x = &keys[(at * shape.kv_heads + kv_head) * shape.dim];
    double dot = 0.0;
    for (int d = 0; d < shape.dim; ++d) dot += query[d] * x[d];
    weights[key] = dot / std::sqrt(static_cast<double>(shape.dim));
    largest = std::max(largest, std::fabs(weights[key]));
    top = std::max(top, weights[key]);
  }
  for (int key = shape.sequences[s].first_key; key < shape.sequences[s].end_key; ++key) {
    sum += std::exp(weights[key] - top);
  }
  const double lse = sum == 0.0 ? -kInfinity : top + std::log(sum);
  for (double& w : weights) w = std::exp(w - lse);
  return lse;
}

inline double sum_of_cosines(const std::vector<std::vector<double>>& a,
                             const std::vector<std::vector<double>>& b, int first, int end) {
  double total = 0.0;
  for (int key = first; key < end; ++key) {
    double dot = 0.0, aa = 0.0, bb = 0.0;
    for (size_t h = 0; h < a.size(); ++h) {
      dot += a[h][key] * b[h][key], aa += a[h][key] * a[h][key], bb += b[h][key] * b[h][key];
    }
    total += dot / (std::max(std::sqrt(aa), 1e-8) * std::max(std::sqrt(bb), 1e-8));
  }
  return total;
}

inline Result reference(const Case& c) {
  const Shape& shape = c.shape;
  const size_t heads = shape.heads, dim = shape.dim;
  Result result;
  result.out.assign(c.rows.size() * heads * dim, 0.0);
  result.lse.assign(c.rows.size() * heads, 0.0);
  result.mass.assign(static_cast<size_t>(c.num_sequences()) * c.capacity, 0.0);
  for (int s = 0; s < c.num_sequences(); ++s) {
    const Sequence& q = shape.sequences[s];
    const int begin = c.segments[s * kSegmentColumns], window = begin + q.tracked + q.committed;
    std::vector<int> old_row(c.capacity, -1);
    for (int r = begin; r < begin + q.num_rows(); ++r) {
      if (c.rows[r] >= 0) old_row[c.rows[r] % c.capacity] = r;
    }
    double total = 0.0;
    int num_tracked = 0;
    for (int r = begin; r < begin + q.num_rows(); ++r) {
      if (c.rows[r] < 0) continue;
      const bool is_tracked = r < begin + q.tracked;
      std::vector<std::vector<double>> recent(heads, std::vector<double>(c.capacity)), old = recent;
      for (size_t h = 0; h < heads; ++h) {
        const double* query = &c.q[(c.rows[r] * heads + h) * dim];
        result.lse[r * heads + h] =
            softmax(c, s, static_cast<int>(h), query, {}, recent[h], result.largest_score);
        if (is_tracked) {
          softmax(c, s, static_cast<int>(h), &c.q_old[(r * heads + h) * dim], old_row, old[h],
                  result.largest_score);
        }
        const size_t kv_head = h / (heads / shape.kv_heads);
        for (int key = q.first_key; key < q.end_key; ++key) {
          const size_t slot = static_cast<size_t>(s) * c.capacity + key;
          const double* x = &c.v[(slot * shape.kv_heads + kv_head) * dim];
          double* to = &result.out[(r * heads + h) * dim];
          for (size_t d = 0; d < dim; ++d) to[d] += recent[h][key] * x[d];
          if (r >= window && r < window + q.window) result.mass[slot] += recent[h][key];
        }
      }
      if (!is_tracked) continue;
      total += sum_of_cosines(recent, old, q.first_key, q.end_key);
      ++num_tracked;
    }
    const int keys = q.end_key - q.first_key;
    const bool has_any = num_tracked > 0 && keys > 0;
    result.similarity.push_back(has_any ? total / (static_cast<double>(num_tracked) * keys)
                                        : kInfinity);
  }
  return result;
}

inline Case rounded(const Case& c) {
  Case r = c;
  for (auto* x : {&r.q, &r.k, &r.v, &r.q_old, &r.k_old}) {
    for (double& value : *x) value = round_to(c.shape.dtype, value);
  }
  return r;
}

}  // namespace elastic_cache::probe
