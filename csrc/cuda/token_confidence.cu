// A block owns a row of logits and reads it twice: the argmax and the maximum first, the sum of the
// exponentials second, from the second-level cache (a bfloat16 row of 126,464 is 253 KB). At 110
// GB/s an SM that is 2.3 us a pass; one block a row is enough for the rows of a step.
// The subtle thing: a row with a NaN or +inf is not an error here, but gets confidence NaN, which
// the commit refuses.
#include "elastic_cache/token_confidence.h"

#include <math_constants.h>

#include "common/launch.h"
#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace elastic_cache {
namespace {

using cuda::to_float;

constexpr int kThreads = 1024;

// What a thread, a warp and in the end the block know of a row.
struct Best {
  double score;  // logit plus noise
  int64_t token;
  float logit;    // of the token
  float largest;  // of all logits
  bool is_finite;
};

__device__ Best better(const Best& a, const Best& b) {
  const bool takes_b = b.score > a.score || (b.score == a.score && b.token < a.token);
  Best best = takes_b ? b : a;
  best.largest = fmaxf(a.largest, b.largest);
  best.is_finite = a.is_finite && b.is_finite;
  return best;
}

__device__ Best shuffle(const Best& x, int offset) {
  return {__shfl_xor_sync(cuda::kFullWarp, x.score, offset),
          __shfl_xor_sync(cuda::kFullWarp, x.token, offset),
          __shfl_xor_sync(cuda::kFullWarp, x.logit, offset),
          __shfl_xor_sync(cuda::kFullWarp, x.largest, offset),
          static_cast<bool>(__shfl_xor_sync(cuda::kFullWarp, int{x.is_finite}, offset))};
}

__device__ Best block_best(Best best, Best* shared) {
  for (int offset = cuda::kWarpSize / 2; offset > 0; offset /= 2) {
    best = better(best, shuffle(best, offset));
  }
  if (threadIdx.x % cuda::kWarpSize == 0) shared[threadIdx.x / cuda::kWarpSize] = best;
  __syncthreads();
  best = shared[0];
  for (int w = 1; w < kThreads / cuda::kWarpSize; ++w) best = better(best, shared[w]);
  return best;
}

// f(v, logit) for the elements of this thread, N at a time.
template <class T, int N, class F>
__device__ void for_each(const T* logits, int64_t size, const F& f) {
#pragma unroll 4
  for (int64_t v = int64_t{threadIdx.x} * N; v < size; v += int64_t{kThreads} * N) {
    const auto pack = cuda::load_pack<T, N>(logits + v);
#pragma unroll
    for (int n = 0; n < N; ++n) f(v + n, to_float(pack.data[n]));
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) token_confidence_kernel(TokenConfidenceParams p) {
  __shared__ Best shared[kThreads / cuda::kWarpSize];
  __shared__ double sums[kThreads / cuda::kWarpSize];
  const int64_t row = blockIdx.x;
  const T* logits = static_cast<const T*>(p.logits) + row * p.logits_row_stride;
  const double* noise = p.noise ? p.noise + row * p.vocab_size : nullptr;

  Best best{-CUDART_INF, p.vocab_size, -CUDART_INF_F, -CUDART_INF_F, true};
  for_each<T, N>(logits, p.vocab_size, [&](int64_t v, float logit) {
    best.is_finite = best.is_finite && logit < CUDART_INF_F;  // false for a NaN as well
    best.largest = fmaxf(best.largest, logit);
    const double score = noise ? double{logit} + noise[v] : double{logit};
    if (score > best.score || (score == best.score && v < best.token)) {
      best.score = score;
      best.token = v;
      best.logit = logit;
    }
  });
  best = block_best(best, shared);

  double sum = 0.0;
  for_each<T, N>(logits, p.vocab_size,
                 [&](int64_t, float logit) { sum += double{expf(logit - best.largest)}; });
  sum = cuda::block_sum(sum, sums);
  if (threadIdx.x != 0) return;
  const bool is_usable = best.is_finite && best.token < p.vocab_size;
  p.token[row] = is_usable ? best.token : 0;
  p.confidence[row] = is_usable ? exp(double{best.logit} - double{best.largest}) / sum : CUDART_NAN;
}

template <class T, int N>
void launch(const TokenConfidenceParams& p, Stream stream) {
  token_confidence_kernel<T, N><<<static_cast<unsigned int>(p.num_rows), kThreads, 0, stream>>>(p);
  cuda::check_launch("token_confidence");
}

}  // namespace

void token_confidence_cuda(const TokenConfidenceParams& params, Stream stream) {
  if (params.num_rows == 0) return;
  cuda::with_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool has_vectors =
        cuda::are_vectors<T>({params.logits}, {params.vocab_size, params.logits_row_stride});
    cuda::with_pack_size<T>(has_vectors, [&](auto size) { launch<T, size()>(params, stream); });
  });
}

}  // namespace elastic_cache
