// add_rms_norm of one row. One pass updates the residual and sums its squares, a second one
// normalises; the row stays in the first-level cache in between.
#pragma once

#include <cmath>
#include <cstring>

#include "common.h"
#include "elastic_cache/add_rms_norm.h"

namespace elastic_cache {

inline constexpr double kNormNanoseconds = 0.6;  // an element, of one core with AVX2

// residual += delta, rounded to T; returns the sum of squares of what was stored.
template <class T>
inline float add_and_square(T* residual, const T* delta, int64_t width) {
  Float8 squares[2] = {};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    Float8 x = load8(residual + i);
    if (delta) {
      x = round_to<T>(x + load8(delta + i));
      store8(residual + i, x);
    }
    Float8& total = squares[(i / kLanes) % 2];
    total = multiply_add(x, x, total);
  }
  float total = sum(squares[0] + squares[1]);
  for (; i < width; ++i) {
    if (delta) residual[i] = from_float<T>(to_float(residual[i]) + to_float(delta[i]));
    total += to_float(residual[i]) * to_float(residual[i]);
  }
  return total;
}

template <class T>
inline void normalise(const T* residual, const T* weight, float inverse, int64_t width, T* out) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    store8(out + i, round_to<T>(load8(residual + i) * inverse) * load8(weight + i));
  }
  for (; i < width; ++i) {
    out[i] = from_float<T>(round_to<T>(to_float(residual[i]) * inverse) * to_float(weight[i]));
  }
}

template <class T>
inline void add_rms_norm_row(const AddRmsNormParams& p, int64_t row) {
  T* residual = static_cast<T*>(p.residual) + row * p.width;
  const T* delta = p.delta ? static_cast<const T*>(p.delta) + row * p.width : nullptr;
  const float squares = add_and_square(residual, delta, p.width);
  if (p.x_cache && p.rows[row] >= 0) {
    T* cached = static_cast<T*>(p.x_cache) + int64_t{p.rows[row]} * p.width;
    std::memcpy(cached, residual, static_cast<size_t>(p.width) * sizeof(T));
  }
  const float inverse = 1.0f / std::sqrt(squares / static_cast<float>(p.width) + p.eps);
  normalise(residual, static_cast<const T*>(p.weight), inverse, p.width,
            static_cast<T*>(p.out) + row * p.width);
}

}  // namespace elastic_cache
