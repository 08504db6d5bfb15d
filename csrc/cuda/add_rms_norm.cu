// A block owns a row: it adds, sums the squares, and normalises from registers, so a row is read
// and written once. Sums have a fixed order: the same bits in every run and whatever the batch.
// The first kMaxRounds chunks of kThreads packs stay in registers; the rest of a longer row is
// read again.
#include "elastic_cache/add_rms_norm.h"

#include "common/launch.h"
#include "common/reduce.cuh"
#include "common/vector.cuh"

namespace elastic_cache {
namespace {

using cuda::from_float;
using cuda::to_float;

constexpr int kThreads = 512;
constexpr int kMaxRounds = 2;  // chunks of a row a thread keeps in registers: 8,192 bfloat16

// residual += delta for one chunk of N elements; stores it, and returns it as floats.
template <class T, int N>
__device__ void add_chunk(T* residual, const T* delta, T* cached, float* x) {
  auto sum = cuda::load_pack<T, N>(residual);
  if (delta) {
    const auto d = cuda::load_pack<T, N>(delta);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      sum.data[n] = from_float<T>(to_float(sum.data[n]) + to_float(d.data[n]));
    }
    cuda::store_pack(residual, sum);
  }
  if (cached) cuda::store_pack(cached, sum);
#pragma unroll
  for (int n = 0; n < N; ++n) x[n] = to_float(sum.data[n]);
}

template <class T, int N>
__device__ void normalise_chunk(const float* x, float inverse, const cuda::Pack<T, N>& w, T* out) {
  cuda::Pack<T, N> result;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    result.data[n] = from_float<T>(cuda::round_to<T>(x[n] * inverse) * to_float(w.data[n]));
  }
  cuda::store_pack(out, result);
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) add_rms_norm_kernel(AddRmsNormParams p) {
  __shared__ float shared[kThreads / cuda::kWarpSize];
  constexpr int64_t kStride = int64_t{kThreads} * N;
  cuda::let_next_start();  // a product: it reads weights ahead
  cuda::wait_for_previous();
  const int64_t row = blockIdx.x, base = row * p.width;
  auto* residual = static_cast<T*>(p.residual) + base;
  const T* delta = p.delta ? static_cast<const T*>(p.delta) + base : nullptr;
  const int64_t slot = p.x_cache ? p.rows[row] : -1;
  T* cached = slot < 0 ? nullptr : static_cast<T*>(p.x_cache) + slot * p.width;
  const auto* weight = static_cast<const T*>(p.weight);
  auto* out = static_cast<T*>(p.out) + base;
  const int64_t first = int64_t{threadIdx.x} * N;

  cuda::Pack<T, N> weights[kMaxRounds];  // on their way while the sum is taken
#pragma unroll
  for (int round = 0; round < kMaxRounds; ++round) {
    const int64_t i = first + round * kStride;
    if (i < p.width) weights[round] = cuda::load_pack<T, N>(weight + i);
  }
  float x[kMaxRounds][N], squares = 0.0f;
  const auto add = [&](int64_t i, float* values) {
    add_chunk<T, N>(residual + i, delta ? delta + i : nullptr, cached ? cached + i : nullptr,
                    values);
#pragma unroll
    for (int n = 0; n < N; ++n) squares += values[n] * values[n];
  };
#pragma unroll
  for (int round = 0; round < kMaxRounds; ++round) {
    const int64_t i = first + round * kStride;
    if (i < p.width) add(i, x[round]);
  }
  for (int64_t i = first + kMaxRounds * kStride; i < p.width; i += kStride) {
    float values[N];
    add(i, values);
  }

  const float mean = cuda::block_sum(squares, shared) / static_cast<float>(p.width);
  const float inverse = 1.0f / sqrtf(mean + p.eps);
#pragma unroll
  for (int round = 0; round < kMaxRounds; ++round) {
    const int64_t i = first + round * kStride;
    if (i < p.width) normalise_chunk<T, N>(x[round], inverse, weights[round], out + i);
  }
  for (int64_t i = first + kMaxRounds * kStride; i < p.width; i += kStride) {
    float values[N];
    const auto again = cuda::load_pack<T, N>(residual + i);
#pragma unroll
    for (int n = 0; n < N; ++n) values[n] = to_float(again.data[n]);
    normalise_chunk<T, N>(values, inverse, cuda::load_pack<T, N>(weight + i), out + i);
  }
}

template <class T>
bool is_aligned(const AddRmsNormParams& p) {
  return cuda::are_vectors<T>({p.residual, p.delta, p.weight, p.x_cache, p.out}, {p.width});
}

template <class T, int N>
void launch(const AddRmsNormParams& p, Stream stream) {
  cuda::launch_overlapping("add_rms_norm", add_rms_norm_kernel<T, N>,
                           dim3(static_cast<unsigned int>(p.num_rows)), kThreads, stream, p);
}

}  // namespace

void add_rms_norm_cuda(const AddRmsNormParams& params, Stream stream) {
  if (params.num_rows == 0) return;
  cuda::with_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    cuda::with_pack_size<T>(is_aligned<T>(params),
                            [&](auto size) { launch<T, size()>(params, stream); });
  });
}

}  // namespace elastic_cache
