// Per row of logits: the token to commit and how sure the model is of it.
//   token = argmax_v (logits[v] + noise[v])   (noise optional; ties: the lowest token id)
//   confidence = exp(logits[token] - max) / sum_v exp(logits[v] - max), accumulated in double.
// A row with a NaN or +inf logit has confidence NaN (and token 0): it can never be committed.
#pragma once

#include "elastic_cache/types.h"

namespace elastic_cache {

struct TokenConfidenceParams {
  DType dtype;
  int64_t num_rows;    // W
  int64_t vocab_size;  // V

  int64_t logits_row_stride;  // elements between rows of logits
  const void* logits;         // [W, V] dtype
  const double* noise;        // [W, V], or null

  int64_t* token;      // [W] out
  double* confidence;  // [W] out

  // CUDA only: token_confidence_workspace() bytes, aligned to 16; contents do not matter.
  void* workspace = nullptr;
};

void token_confidence_cpu(const TokenConfidenceParams& params);
int64_t token_confidence_workspace(const TokenConfidenceParams& params);
void token_confidence_cuda(const TokenConfidenceParams& params, Stream stream);

}  // namespace elastic_cache
