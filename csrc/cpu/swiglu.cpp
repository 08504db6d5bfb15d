// out = round(silu(gate)) * up, silu(x) = x / (1 + e^-x) in fp32.
#include "elastic_cache/swiglu.h"

#include "common.h"

namespace elastic_cache {
namespace {

template <class T>
Float8 gated(const T* gate, const T* up) {
  const Float8 x = load8(gate);
  return round_to<T>(x / (exp(-x) + 1.0f)) * load8(up);
}

template <class T>
void swiglu_row(const T* gate, const T* up, int64_t width, T* out) {
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

}  // namespace

void swiglu_cpu(const SwigluParams& params) {
  constexpr double kNanosecondsPerElement = 0.6;
  const int64_t width = params.width;
  with_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* gate_up = static_cast<const T*>(params.gate_up);
    T* out = static_cast<T*>(params.out);
    parallel_for(params.num_rows, kNanosecondsPerElement * static_cast<double>(width),
                 [&](int64_t row) {
                   const T* gate = gate_up + row * 2 * width;
                   swiglu_row(gate, gate + width, width, out + row * width);
                 });
  });
}

}  // namespace elastic_cache
