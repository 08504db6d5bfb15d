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

constexpr int kThreads = 256;

template <class T, int N>
__device__ cuda::RawPack<T, N> load(const void* base, int64_t at) {
  return cuda::load_raw<T, N>(static_cast<const T*>(base) + at);
}
template <class T, int N>
__device__ void store(void* base, int64_t at, const cuda::RawPack<T, N>& x) {
  cuda::store_raw<T, N>(static_cast<T*>(base) + at, x);
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
// before the first store: the compiler cannot know that they are of other places. (Counts within a
// row are int: a division of 64 bits is a function call.)
template <class T, int N>
__device__ void rotate_pairs(const CacheWriteParams& p, int row, int slot, int task, int num_heads,
                             int source, void* cache, void* old) {
  const int dim = static_cast<int>(p.head_dim), half = dim / 2, per_head = half / N;
  const int i = task % per_head * N, first = task / per_head * dim + i;
  const int64_t width = num_heads * dim;
  const bool is_skipped = slot < 0;
  const int64_t at = (is_skipped ? 0 : slot * width) + first, saved = row * width + first;
  const int64_t from = row * p.qkv_row_stride + source + first;
  const int position = is_skipped ? 0 : slot % static_cast<int>(p.capacity);
  const float* rope = p.rope + int64_t{position} * dim + i;
  // Four elements at a time: with all eight, 128 rows would not be one wave.
  constexpr int kPart = N < 4 ? N : 4;
  float cosine[kPart], sine[kPart];
  load_floats(rope, cosine);
  load_floats(rope + half, sine);
  const cuda::RawPack<T, N> a = load<T, N>(p.qkv, from), b = load<T, N>(p.qkv, from + half);
  cuda::RawPack<T, N> before[2] = {};
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
    if (n > 0 && n % kPart == 0) {
      load_floats(rope + n, cosine);
      load_floats(rope + half + n, sine);
    }
    const float x = cuda::raw_element<T, N>(a, n), y = cuda::raw_element<T, N>(b, n);
    left.data[n] = from_float<T>(x * cosine[n % kPart] - y * sine[n % kPart]);
    right.data[n] = from_float<T>(y * cosine[n % kPart] + x * sine[n % kPart]);
  }
  cuda::store_pack(static_cast<T*>(cache) + at, left);
  cuda::store_pack(static_cast<T*>(cache) + at + half, right);
}

// All segments are asked, not the one of the row's slot, which would have to be known first.
__device__ bool is_query_saved(const CacheWriteParams& p, int row) {
  bool is_saved = p.segments == nullptr;
  for (int s = 0; s < p.num_segments; ++s) {
    const int32_t* segment = p.segments + s * kSegmentColumns;
    const int rank = row - segment[kSegmentBegin];
    is_saved |= rank >= 0 && rank < segment[kSegmentTracked];
  }
  return is_saved;
}

// Six blocks an SM: 128 rows of LLaDA-8B are one wave.
template <class T, int N>
__global__ void __launch_bounds__(kThreads, 6) cache_write_kernel(const CacheWriteParams p) {
  cuda::wait_for_previous();
  const int row = static_cast<int>(blockIdx.x), slot = p.rows[row];
  const int num_heads = static_cast<int>(p.num_heads), dim = static_cast<int>(p.head_dim);
  const int num_kv_heads = static_cast<int>(p.num_kv_heads);
  const int num_q = num_heads * dim / 2 / N, num_k = num_kv_heads * dim / 2 / N;
  int task = static_cast<int>(blockIdx.y) * kThreads + static_cast<int>(threadIdx.x);
  if (task < num_q) {
    void* old = is_query_saved(p, row) ? p.q_old : nullptr;
    rotate_pairs<T, N>(p, row, slot, task, num_heads, 0, p.q_cache, old);
    return;
  }
  task -= num_q;
  if (task < num_k) {
    rotate_pairs<T, N>(p, row, slot, task, num_kv_heads, num_heads * dim, p.k_cache, p.k_old);
    return;
  }
  task -= num_k;
  const int64_t kv_width = num_kv_heads * dim;
  if (slot < 0 || task >= kv_width / N) return;
  const int64_t from = row * p.qkv_row_stride + num_heads * dim + kv_width + task * N;
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
