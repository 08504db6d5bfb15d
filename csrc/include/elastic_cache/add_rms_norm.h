// Residual update, RMS normalisation and (optionally) the layer-input cache in one pass:
//   residual += delta                          (delta optional; rounded to dtype, as torch does)
//   x_cache[rows[r]] = residual[r]             (optional)
//   out = dtype(residual / sqrt(mean(residual^2) + eps)) * weight
// The subtle thing is the order: normalise in fp32, round to dtype, then times the weight.
#pragma once

#include "elastic_cache/types.h"

namespace elastic_cache {

struct AddRmsNormParams {
  DType dtype;
  int64_t num_rows;  // R
  int64_t width;     // d
  float eps;

  void* residual;       // [R, d] dtype, in and out
  const void* delta;    // [R, d] dtype, or null
  const void* weight;   // [d] dtype
  const int32_t* rows;  // [R] slots, -1 = do not store; null without x_cache
  void* x_cache;        // [N, d] dtype, or null
  void* out;            // [R, d] dtype
};

void add_rms_norm_cpu(const AddRmsNormParams& params);
void add_rms_norm_cuda(const AddRmsNormParams& params, Stream stream);

}  // namespace elastic_cache
