// What swiglu computes of one element.
#pragma once

#include "common/vector.cuh"

namespace elastic_cache::cuda {

template <class T>
__device__ inline T gated(T gate, T up) {
  const float x = to_float(gate);
  return from_float<T>(round_to<T>(__fdividef(x, 1.0f + __expf(-x))) * to_float(up));
}

}  // namespace elastic_cache::cuda
