// out = silu(gate) * up, with gate and up the two halves of one fused projection.
// silu is evaluated in fp32 and rounded to dtype before the product, as torch does.
#pragma once

#include "elastic_cache/types.h"

namespace elastic_cache {

struct SwigluParams {
  DType dtype;
  int64_t num_rows;  // R
  int64_t width;     // F

  const void* gate_up;  // [R, 2F] dtype: gate, then up
  void* out;            // [R, F] dtype
};

void swiglu_cpu(const SwigluParams& params);
void swiglu_cuda(const SwigluParams& params, Stream stream);

}  // namespace elastic_cache
