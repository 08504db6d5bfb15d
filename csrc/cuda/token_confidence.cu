// A row of logits is cut into parts, a block each: its best element and its sum of exponentials go
// to the workspace, and a second kernel joins the parts of a row, a warp a row. The number of parts
// depends on the vocabulary alone, and parts are joined in order: the same bits whatever the rows.
// The subtle thing: a row with a NaN or +inf is not an error here, but gets confidence NaN, which
// the commit refuses.
#include "elastic_cache/token_confidence.h"

#include <math_constants.h>

#include <algorithm>

#include "common/heuristics.h"
#include "common/launch.h"
#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace elastic_cache {
namespace {

using cuda::to_float;

constexpr int kThreads = 256;
constexpr int kJoinWarps = 4;

// What a thread, a warp, a block and in the end a row know: the best element and the largest logit.
struct Best {
  double score;  // logit plus noise
  int64_t token;
  float logit;    // of the token
  float largest;  // of all logits
  bool is_finite;
};

struct Part {
  Best best;
  double sum;  // of exp(logit - best.largest)
};

__device__ Best better(const Best& a, const Best& b) {
  const bool takes_b = b.score > a.score || (b.score == a.score && b.token < a.token);
  Best best = takes_b ? b : a;
  best.largest = fmaxf(a.largest, b.largest);
  best.is_finite = a.is_finite && b.is_finite;
  return best;
}

__device__ Best warp_best(Best best) {
  for (int offset = cuda::kWarpSize / 2; offset > 0; offset /= 2) {
    const auto from = [&](auto x) { return __shfl_xor_sync(cuda::kFullWarp, x, offset); };
    best = better(best, {from(best.score), from(best.token), from(best.logit), from(best.largest),
                         from(int{best.is_finite}) != 0});
  }
  return best;
}

__device__ Best block_best(Best best, Best* shared) {
  best = warp_best(best);
  if (threadIdx.x % cuda::kWarpSize == 0) shared[threadIdx.x / cuda::kWarpSize] = best;
  __syncthreads();
  best = shared[0];
  for (int w = 1; w < kThreads / cuda::kWarpSize; ++w) best = better(best, shared[w]);
  return best;
}

__device__ Best nothing(int64_t vocab_size) {
  return {-CUDART_INF, vocab_size, -CUDART_INF_F, -CUDART_INF_F, true};
}

// f(v, logit) for the elements begin .. end - 1 of this thread, N at a time.
template <class T, int N, class F>
__device__ void for_each(const T* logits, int64_t begin, int64_t end, const F& f) {
#pragma unroll 4
  for (int64_t v = begin + int64_t{threadIdx.x} * N; v < end; v += int64_t{kThreads} * N) {
    const auto pack = cuda::load_pack<T, N>(logits + v);
#pragma unroll
    for (int n = 0; n < N; ++n) f(v + n, to_float(pack.data[n]));
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    token_confidence_kernel(TokenConfidenceParams p, Part* parts) {
  __shared__ Best shared[kThreads / cuda::kWarpSize];
  __shared__ double sums[kThreads / cuda::kWarpSize];
  cuda::wait_for_previous();
  const int64_t row = blockIdx.y;
  const int64_t begin = int64_t{blockIdx.x} * cuda::kVocabularyPart;
  const int64_t end = min(begin + cuda::kVocabularyPart, p.vocab_size);
  const T* logits = static_cast<const T*>(p.logits) + row * p.logits_row_stride;
  const double* noise = p.noise ? p.noise + row * p.vocab_size : nullptr;

  Best best = nothing(p.vocab_size);
  for_each<T, N>(logits, begin, end, [&](int64_t v, float logit) {
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
  if (best.largest != -CUDART_INF_F) {
    for_each<T, N>(logits, begin, end,
                   [&](int64_t, float logit) { sum += double{expf(logit - best.largest)}; });
  }
  sum = cuda::block_sum(sum, sums);
  if (threadIdx.x == 0) parts[row * gridDim.x + blockIdx.x] = {best, sum};
}

// Parts of a row, a lane each (and in turn), to its token and confidence.
__global__ void __launch_bounds__(kJoinWarps* cuda::kWarpSize)
    token_confidence_join_kernel(TokenConfidenceParams p, const Part* parts, int num_parts) {
  cuda::wait_for_previous();
  const int lane = static_cast<int>(threadIdx.x) % cuda::kWarpSize;
  const int64_t row =
      int64_t{blockIdx.x} * kJoinWarps + static_cast<int>(threadIdx.x) / cuda::kWarpSize;
  if (row >= p.num_rows) return;
  parts += row * num_parts;
  Best best = nothing(p.vocab_size);
  for (int i = lane; i < num_parts; i += cuda::kWarpSize) best = better(best, parts[i].best);
  best = warp_best(best);
  double sum = 0.0;
  for (int i = lane; i < num_parts; i += cuda::kWarpSize) {
    const float largest = parts[i].best.largest;
    if (largest == -CUDART_INF_F) continue;
    sum += parts[i].sum * exp(double{largest} - double{best.largest});
  }
  sum = cuda::warp_reduce(sum, cuda::Sum{});
  if (lane != 0) return;
  const bool is_usable = best.is_finite && best.token < p.vocab_size;
  p.token[row] = is_usable ? best.token : 0;
  p.confidence[row] = is_usable ? exp(double{best.logit} - double{best.largest}) / sum : CUDART_NAN;
}

int64_t num_parts(const TokenConfidenceParams& p) {
  return cuda::blocks_for(p.vocab_size, cuda::kVocabularyPart);
}

}  // namespace

int64_t token_confidence_workspace(const TokenConfidenceParams& params) {
  return params.num_rows * num_parts(params) * static_cast<int64_t>(sizeof(Part));
}

void token_confidence_cuda(const TokenConfidenceParams& params, Stream stream) {
  if (params.num_rows == 0) return;
  auto* parts = static_cast<Part*>(params.workspace);
  const auto count = static_cast<unsigned int>(num_parts(params));
  const dim3 grid(count, static_cast<unsigned int>(params.num_rows));
  cuda::with_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool has_vectors =
        cuda::are_vectors<T>({params.logits}, {params.vocab_size, params.logits_row_stride});
    cuda::with_pack_size<T>(has_vectors, [&](auto size) {
      cuda::launch_overlapping("token_confidence", token_confidence_kernel<T, size()>, grid,
                               kThreads, stream, params, parts);
    });
  });
  cuda::launch_overlapping("token_confidence", token_confidence_join_kernel,
                           dim3(cuda::blocks_for(params.num_rows, kJoinWarps)),
                           kJoinWarps * cuda::kWarpSize, stream, params, parts,
                           static_cast<int>(count));
}

}  // namespace elastic_cache
