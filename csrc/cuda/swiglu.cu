// out = round(silu(gate)) * up; a thread owns 16 bytes of a row. Bound by memory: gate_up read
// once.
#include "elastic_cache/swiglu.h"

#include "common/launch.h"
#include "common/vector.cuh"
#include "swiglu.cuh"

namespace elastic_cache {
namespace {

constexpr int kThreads = 256;

template <class T, int N>
__global__ void swiglu_kernel(const T* gate_up, int64_t width, T* out) {
  const int64_t i = (int64_t{blockIdx.y} * kThreads + threadIdx.x) * N, row = blockIdx.x;
  cuda::let_next_start();  // a product: it reads weights ahead
  cuda::wait_for_previous();
  if (i >= width) return;
  const T* from = gate_up + row * 2 * width + i;
  const auto gate = cuda::load_pack<T, N>(from), up = cuda::load_pack<T, N>(from + width);
  cuda::Pack<T, N> result;
#pragma unroll
  for (int n = 0; n < N; ++n) result.data[n] = cuda::gated(gate.data[n], up.data[n]);
  cuda::store_pack(out + row * width + i, result);
}

template <class T, int N>
void launch(const SwigluParams& p, Stream stream) {
  const dim3 grid(static_cast<unsigned int>(p.num_rows), cuda::blocks_for(p.width, kThreads * N));
  cuda::launch_overlapping("swiglu", swiglu_kernel<T, N>, grid, kThreads, stream,
                           static_cast<const T*>(p.gate_up), p.width, static_cast<T*>(p.out));
}

}  // namespace

void swiglu_cuda(const SwigluParams& params, Stream stream) {
  if (params.num_rows == 0 || params.width == 0) return;
  cuda::with_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    cuda::with_pack_size<T>(cuda::are_vectors<T>({params.gate_up, params.out}, {params.width}),
                            [&](auto size) { launch<T, size()>(params, stream); });
  });
}

}  // namespace elastic_cache
