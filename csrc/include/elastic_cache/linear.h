// out = x W + bias for the few rows of a step: each weight is read once and used for all rows.
// The subtle thing: a row's result is the same sum in the same order whatever rows it is computed
// with (blocks of 128 terms, added in order), so a sequence does not depend on its batch. On a GPU
// the op is the vendor's product, which does not promise that, unless it is asked for ours.
#pragma once

#include "elastic_cache/types.h"

namespace elastic_cache {

struct LinearParams {
  DType dtype;
  int64_t num_rows;      // R
  int64_t in_features;   // K
  int64_t out_features;  // N

  int64_t x_row_stride;       // elements between rows of x
  int64_t weight_row_stride;  // elements between rows of weight
  const void* x;              // [R, K] dtype
  const void* weight;         // [K, N] dtype
  const void* bias;           // [N] dtype, or null
  void* out;                  // [R, N] dtype
};

void linear_cpu(const LinearParams& params);

}  // namespace elastic_cache
