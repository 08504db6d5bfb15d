// Attention of a few rows over all keys of their sequence, with log-sum-exp (window_attention.h).
//
// A lane is a (row, query head) pair; the lanes of a key/value head share its keys. Two kernels:
//   part     a block takes up to 128 lanes of one key/value head and one of `num_splits` parts of
//            the keys -> unnormalised output [D], maximum and sum of every lane
//            (attention_plain.cuh is the form to read first, attention_wgmma.cuh the one of 9.0,
//            attention_mma.cuh that of 8.0, of head_dim 32, and of several sequences of which
//            nothing says where their rows lie)
//   combine  a warp a lane adds the parts in order (attention_launch.cuh); not where there is one,
//            which attention_wgmma.cuh writes as the result
#include "elastic_cache/window_attention.h"

#include "attention_launch.cuh"

namespace elastic_cache {

int64_t window_attention_workspace(const WindowAttentionParams& p) {
  const int64_t items = cuda::attention_splits(p.num_kv_heads, p.capacity, p.num_sequences) *
                        p.num_rows * p.num_heads;
  return items * (p.head_dim + 2) * static_cast<int64_t>(sizeof(float));
}

void window_attention_cuda(const WindowAttentionParams& params, Stream stream) {
  if (params.num_rows == 0 || params.num_heads == 0) return;
  cuda::attention::launch(params, stream);
}

}  // namespace elastic_cache
