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

constexpr int kThreads = 256;
constexpr int kMaxRounds = 2;  // chunks of a row a thread keeps in registers: 4,096 bfloat16

// A row: residual += delta, kept in cached as well; out = normalised residual * weight.
template <class T, int N>
struct Row {
  using Pack = cuda::Pack<T, N>;
  using Raw = cuda::RawPack<T, N>;
  T* residual;
  const T* delta;  // or null
  T* cached;       // or null
  const T* weight;
  T* out;

  __device__ Row(const AddRmsNormParams& p, int64_t row) {
    const int64_t base = row * p.width;
    residual = static_cast<T*>(p.residual) + base;
    delta = p.delta ? static_cast<const T*>(p.delta) + base : nullptr;
    const int64_t slot = p.x_cache ? p.rows[row] : -1;
    cached = slot < 0 ? nullptr : static_cast<T*>(p.x_cache) + slot * p.width;
    weight = static_cast<const T*>(p.weight);
    out = static_cast<T*>(p.out) + base;
  }

  __device__ Raw load(const T* from, int i) const { return cuda::load_raw<T, N>(from + i); }
  __device__ static float element(const Raw& raw, int n) { return cuda::raw_element<T, N>(raw, n); }
  // One chunk, `sum` the residual before: stores the sum, and returns its squares'.
  __device__ float add(int i, Raw& sum, const Raw& added) const {
    if (delta) {
      Pack total;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        total.data[n] = from_float<T>(element(sum, n) + element(added, n));
      }
      sum = reinterpret_cast<const Raw&>(total);
      cuda::store_raw<T, N>(residual + i, sum);
    }
    if (cached) cuda::store_raw<T, N>(cached + i, sum);
    float squares = 0.0f;
#pragma unroll
    for (int n = 0; n < N; ++n) squares += element(sum, n) * element(sum, n);
    return squares;
  }
  __device__ void normalise(int i, const Raw& sum, const Raw& w, float inverse) const {
    Pack result;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      result.data[n] = from_float<T>(cuda::round_to<T>(element(sum, n) * inverse) * element(w, n));
    }
    cuda::store_pack(out + i, result);
  }
};

template <class T, int N>
__global__ void __launch_bounds__(kThreads, 5) add_rms_norm_kernel(AddRmsNormParams p) {
  __shared__ float shared[kThreads / cuda::kWarpSize];
  constexpr int kStride = kThreads * N;
  cuda::let_next_start();  // a product: it reads weights ahead
  cuda::wait_for_previous();
  const Row<T, N> row(p, blockIdx.x);
  const int first = static_cast<int>(threadIdx.x) * N, rest = first + kMaxRounds * kStride;
  const int width = static_cast<int>(p.width);

  // All loads before the first store: the compiler cannot know that they are of other places.
  typename Row<T, N>::Raw sums[kMaxRounds], added[kMaxRounds], weights[kMaxRounds];
#pragma unroll
  for (int round = 0; round < kMaxRounds; ++round) {
    const int i = first + round * kStride;
    if (i >= width) continue;
    sums[round] = row.load(row.residual, i);
    if (row.delta) added[round] = row.load(row.delta, i);
    weights[round] = row.load(row.weight, i);
  }
  float squares = 0.0f;
#pragma unroll
  for (int round = 0; round < kMaxRounds; ++round) {
    const int i = first + round * kStride;
    if (i < width) squares += row.add(i, sums[round], added[round]);
  }
#pragma unroll 1
  for (int i = rest; i < width; i += kStride) {
    auto sum = row.load(row.residual, i);
    squares += row.add(i, sum, row.delta ? row.load(row.delta, i) : sum);
  }

  const float mean = cuda::block_sum(squares, shared) / static_cast<float>(p.width);
  const float inverse = 1.0f / sqrtf(mean + p.eps);
#pragma unroll
  for (int round = 0; round < kMaxRounds; ++round) {
    const int i = first + round * kStride;
    if (i < width) row.normalise(i, sums[round], weights[round], inverse);
  }
#pragma unroll 1
  for (int i = rest; i < width; i += kStride) {
    row.normalise(i, row.load(row.residual, i), row.load(row.weight, i), inverse);
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
