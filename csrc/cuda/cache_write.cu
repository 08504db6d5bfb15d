// A thread owns a few pairs of a head's halves (q, k) or a few elements (v) of one row: it saves
// what it is about to overwrite, rotates and stores, so that nothing needs a barrier.
// At LLaDA-8B a row is 32 KB read and written; the kernel is bound by latency at the rows of a
// step, so a row is spread over several blocks.
#include "elastic_cache/cache_write.h"

#include "common/launch.h"
#include "common/vector.cuh"

namespace elastic_cache {
namespace {

using cuda::from_float;
using cuda::to_float;

constexpr int kThreads = 256;

template <class T, int N>
__device__ cuda::Pack<T, N> load(const void* base, int64_t at) {
  return cuda::load_pack<T, N>(static_cast<const T*>(base) + at);
}
template <class T, int N>
__device__ void store(void* base, int64_t at, const cuda::Pack<T, N>& x) {
  cuda::store_pack(static_cast<T*>(base) + at, x);
}

template <int N>
__device__ void load_floats(const float* from, float (&x)[N]) {
  constexpr int kWidth = N % 4 == 0 ? 4 : 1;
#pragma unroll
  for (int n = 0; n < N; n += kWidth) {
    const auto pack = cuda::load_pack<float, kWidth>(from + n);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[n + i] = pack.data[i];
  }
}

// One task of the q or k part: elements i .. i + N - 1 of both halves of a head. All loads come
// before the first store: the compiler cannot know that they are of other places.
template <class T, int N>
__device__ void rotate_pairs(const CacheWriteParams& p, int64_t row, int64_t slot, int64_t task,
                             int64_t num_heads, int64_t source, void* cache, void* old) {
  const int64_t half = p.head_dim / 2, per_head = half / N;
  const int64_t head = task / per_head, i = task % per_head * N;
  const int64_t first = head * p.head_dim + i, width = num_heads * p.head_dim;
  const bool is_skipped = slot < 0;
  const int64_t at = (is_skipped ? 0 : slot) * width + first, saved = row * width + first;
  const int64_t from = row * p.qkv_row_stride + source + first;
  const float* rope = p.rope + (is_skipped ? 0 : slot % p.capacity) * p.head_dim + i;
  float cosine[N], sine[N];
  load_floats(rope, cosine);
  load_floats(rope + half, sine);
  const cuda::Pack<T, N> a = load<T, N>(p.qkv, from), b = load<T, N>(p.qkv, from + half);
  cuda::Pack<T, N> before[2] = {};
  if (old && !is_skipped) {
    before[0] = load<T, N>(cache, at);
    before[1] = load<T, N>(cache, at + half);
  }
  if (old) {
    store<T, N>(old, saved, before[0]);
    store<T, N>(old, saved + half, before[1]);
  }
  if (is_skipped) return;
  cuda::Pack<T, N> left, right;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const float x = to_float(a.data[n]), y = to_float(b.data[n]);
    left.data[n] = from_float<T>(x * cosine[n] - y * sine[n]);
    right.data[n] = from_float<T>(y * cosine[n] + x * sine[n]);
  }
  store<T, N>(cache, at, left);
  store<T, N>(cache, at + half, right);
}

template <class T, int N>
__global__ void cache_write_kernel(CacheWriteParams p) {
  cuda::wait_for_previous();
  const int64_t row = blockIdx.x, slot = p.rows[row];
  const int64_t half = p.head_dim / 2, q_width = p.num_heads * p.head_dim;
  const int64_t kv_width = p.num_kv_heads * p.head_dim;
  const int64_t num_q = p.num_heads * half / N, num_k = p.num_kv_heads * half / N;
  int64_t task = int64_t{blockIdx.y} * kThreads + threadIdx.x;
  if (task < num_q) {
    rotate_pairs<T, N>(p, row, slot, task, p.num_heads, 0, p.q_cache, p.q_old);
    return;
  }
  task -= num_q;
  if (task < num_k) {
    rotate_pairs<T, N>(p, row, slot, task, p.num_kv_heads, q_width, p.k_cache, p.k_old);
    return;
  }
  task -= num_k;
  if (slot < 0 || task >= kv_width / N) return;
  const int64_t from = row * p.qkv_row_stride + q_width + kv_width + task * N;
  store<T, N>(p.v_cache, slot * kv_width + task * N, load<T, N>(p.qkv, from));
}

template <class T, int N>
void launch(const CacheWriteParams& p, Stream stream) {
  const int64_t num_tasks = (p.num_heads + 2 * p.num_kv_heads) * p.head_dim / N;
  const dim3 grid(static_cast<unsigned int>(p.num_rows), cuda::blocks_for(num_tasks, kThreads));
  cuda::launch_overlapping("cache_write", cache_write_kernel<T, N>, grid, kThreads, stream, p);
}

template <class T>
bool is_aligned(const CacheWriteParams& p) {
  return cuda::are_vectors<T>({p.qkv, p.rope, p.q_cache, p.k_cache, p.v_cache, p.q_old, p.k_old},
                              {p.head_dim / 2, p.qkv_row_stride});
}

}  // namespace

void cache_write_cuda(const CacheWriteParams& params, Stream stream) {
  if (params.num_rows == 0) return;
  cuda::with_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    cuda::with_pack_size<T>(is_aligned<T>(params),
                            [&](auto size) { launch<T, size()>(params, stream); });
  });
}

}  // namespace elastic_cache
