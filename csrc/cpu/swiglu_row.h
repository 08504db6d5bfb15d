// swiglu of neighbouring elements: out = round(silu(gate)) * up, silu(x) = x / (1 + e^-x) in fp32.
#pragma once

#include "common.h"

namespace elastic_cache {

inline constexpr double kSwigluNanoseconds = 0.6;  // an element, of one core with AVX2

template <class T>
inline Float8 gated(const T* gate, const T* up) {
  const Float8 x = load8(gate);
  return round_to<T>(x / (exp(-x) + 1.0f)) * load8(up);
}

template <class T>
inline void swiglu_row(const T* gate, const T* up, int64_t width, T* out) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) store8(out + i, gated(gate + i, up + i));
  if (i == width) return;
  // The last few elements go through the same vector code, so that equal inputs give equal bits.
  T tail[3][kLanes] = {};
  std::copy(gate + i, gate + width, tail[0]);
  std::copy(up + i, up + width, tail[1]);
  store8(tail[2], gated(tail[0], tail[1]));
  std::copy(tail[2], tail[2] + (width - i), out + i);
}

}  // namespace elastic_cache
