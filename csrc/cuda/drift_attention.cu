// window_attention, then column mass of the window rows and the cosine over heads, old against new.
//
// K is read once, by blocks of 128 keys and one head; two kernels:
//   scan     scores of all lanes (window rows, tracked rows, tracked rows as they were) against the
//            block's keys -> mass of this head; p_new and the old scores of tracked rows; maximum
//            and sum of the old scores
//   compare  a block takes 128 keys of a tracked row: old log-sum-exp of every head, then the
//            cosine, a thread a key; others add the heads' masses. The last block of a sequence to
//            finish adds the cosines up
// Tensor-core form of the scan: a warp holds 16 keys as A fragments, the lanes are the columns, so
// that a key's mass is added up in registers.
// The subtle thing: old queries must see the keys as they were. Rows put back lie in a second tile
// in shared memory, and a matrix load takes each row from whichever tile has it.
// Every sum has one order, fixed by the sizes; the only atomic counts finished blocks.
#include "elastic_cache/drift_attention.h"

#include <algorithm>
#include <cmath>

#include "common/heuristics.h"
#include "common/launch.h"
#include "common/mma.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"
#include "drift_attention_compare.cuh"
#include "drift_attention_plain.cuh"
#include "elastic_cache/window_attention.h"

namespace elastic_cache {
namespace cuda::drift {
namespace {

using bf16 = __nv_bfloat16;

constexpr int kChunk = kDriftChunkLanes;
constexpr int kScanThreads = kBlockKeys / 16 * kWarpSize;  // a warp for 16 keys

// ---- Scan with tensor cores ----

template <int D>
struct alignas(16) ScanShared {
  bf16 keys[kBlockKeys][D + kRowPad];
  bf16 old_keys[kBlockKeys][D + kRowPad];  // only those overwritten
  bf16 queries[2][kChunk][D + kRowPad];
  float2 softmax[kScanThreads / kWarpSize][kChunk];
  float lse[2][kChunk];  // base 2; +infinity where no probability is wanted
  int overwritten_by[kBlockKeys];
};

template <int D>
class Scan {
 public:
  __device__ Scan(const DriftAttentionParams& p, const Workspace& w, const Sequence& q,
                  ScanShared<D>& sh)
      : p_(p),
        w_(w),
        q_(q),
        sh_(sh),
        head_(static_cast<int>(blockIdx.y)),
        kv_head_(head_ / static_cast<int>(p.num_heads / p.num_kv_heads)),
        position_(static_cast<int>(blockIdx.x) * kBlockKeys),
        num_now_((q.num_lanes() + kChunk - 1) / kChunk),
        num_old_((q.num_tracked + kChunk - 1) / kChunk) {}

  __device__ int num_chunks() const { return num_now_ + num_old_; }

  __device__ void copy_keys() const {
    const int64_t slot = q_.index * p_.capacity + position_;
    const auto* from =
        static_cast<const bf16*>(p_.k_cache) + (slot * p_.num_kv_heads + kv_head_) * D;
#pragma unroll 4
    for (int at = static_cast<int>(threadIdx.x); at < kBlockKeys * kVectors; at += kScanThreads) {
      const int key = at / kVectors, column = at % kVectors * 8;
      const bool is_valid = q_.has_key(position_ + key);
      const int64_t offset = is_valid ? key * p_.num_kv_heads * D + column : 0;
      copy_async(&sh_.keys[key][column], is_valid ? from + offset : p_.k_cache, is_valid);
    }
  }

  __device__ void copy_old_keys() const {
    if (num_old_ == 0) return;
    find_overwritten(p_, q_, position_, sh_.overwritten_by);
    const auto* from = static_cast<const bf16*>(p_.k_old) + int64_t{kv_head_} * D;
    for (int at = static_cast<int>(threadIdx.x); at < kBlockKeys * kVectors; at += kScanThreads) {
      const int key = at / kVectors, column = at % kVectors * 8;
      const int row = sh_.overwritten_by[key];
      if (row < 0 || !q_.has_key(position_ + key)) continue;
      copy_async(&sh_.old_keys[key][column], from + row * p_.num_kv_heads * D + column, true);
    }
  }

  // Starts copying the queries of a chunk, if there is one; always a group.
  __device__ void copy_chunk(int chunk) const {
    const bool is_old = chunk >= num_now_;
    const int first = (is_old ? chunk - num_now_ : chunk) * kChunk;
    const int count = chunk >= num_chunks() ? 0 : is_old ? q_.num_tracked : q_.num_lanes();
    for (int at = static_cast<int>(threadIdx.x); at < kChunk * kVectors; at += kScanThreads) {
      const int lane = at / kVectors, column = at % kVectors * 8;
      if (first + lane >= round_up(count)) break;
      const int row = row_at(is_old, first + lane, count);
      const int slot = row < 0 ? -1 : p_.rows[row];
      const auto* queries = static_cast<const bf16*>(is_old ? p_.q_old : p_.q_cache);
      const int64_t from = (int64_t{is_old ? row : slot} * p_.num_heads + head_) * D + column;
      copy_async(&sh_.queries[chunk % 2][lane][column], slot < 0 ? queries : queries + from,
                 slot >= 0);
    }
    if (threadIdx.x < kChunk) {
      const int row = row_at(is_old, first + static_cast<int>(threadIdx.x), count);
      const bool is_valid = row >= 0 && p_.rows[row] >= 0;
      sh_.lse[chunk % 2][threadIdx.x] =
          is_valid ? p_.lse[row * p_.num_heads + head_] * kLog2E : INFINITY;
    }
    commit_copies();
  }

  // A fragments of this warp's 16 keys, as they are or as they were.
  __device__ void load_keys(bool is_old, uint32_t (&keys)[D / 16][4]) const {
    const int key = static_cast<int>(threadIdx.x) / kWarpSize * 16 + a_row();
    const bf16* row = is_old && sh_.overwritten_by[key] >= 0 ? sh_.old_keys[key] : sh_.keys[key];
#pragma unroll
    for (int i = 0; i < D / 16; ++i) load_matrices(keys[i], row + i * 16 + a_column());
  }

  __device__ void scan_chunk(int chunk, const uint32_t (&keys)[D / 16][4], float (&mass)[2]) const {
    const bool is_old = chunk >= num_now_;
    const int first = (is_old ? chunk - num_now_ : chunk) * kChunk;
    const int count = min((is_old ? q_.num_tracked : q_.num_lanes()) - first, kChunk);
    for (int step = 0; step < count; step += kStep) {
      float scores[kStep / 8][4] = {};
#pragma unroll
      for (int i = 0; i < D / 16; ++i) {
#pragma unroll
        for (int n = 0; n < kStep / 8; n += 2) {
          uint32_t b[4];
          load_matrices(b, &sh_.queries[chunk % 2][step + n * 8 + b_row()][i * 16 + b_column()]);
          multiply_add(scores[n], keys[i], b[0], b[1]);
          multiply_add(scores[n + 1], keys[i], b[2], b[3]);
        }
      }
      if (is_old) {
        keep_old(scores, step, first);
      } else {
        weigh(scores, chunk % 2, step, first, mass);
      }
    }
    if (is_old) join_warps(first, count);
  }

  __device__ void write_mass(const float (&mass)[2]) const {
    float* to = w_.mass + (head_ * p_.num_sequences + q_.index) * p_.capacity;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = mass[half];
      total += __shfl_xor_sync(kFullWarp, total, 1);
      total += __shfl_xor_sync(kFullWarp, total, 2);
      if (threadIdx.x % 4 == 0 && q_.has_key(key_position(half))) to[key_position(half)] = total;
    }
  }

 private:
  static constexpr int kVectors = D / 8;
  static constexpr int kStep = 32;  // lanes at a time: four products under way

  __device__ static int round_up(int count) { return (count + kStep - 1) / kStep * kStep; }
  __device__ int row_at(bool is_old, int lane, int count) const {
    if (lane >= count) return -1;
    return is_old ? q_.begin + lane : q_.row_of(lane);
  }
  __device__ int key_position(int half) const {
    return position_ + static_cast<int>(threadIdx.x) / kWarpSize * 16 +
           static_cast<int>(threadIdx.x) % kWarpSize / 4 + half * 8;
  }
  __device__ static int column(int step, int n, int i) {
    return step + n * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + i;
  }

  // Scores of the cache as it is: mass of window rows, probabilities of tracked rows.
  __device__ void weigh(const float (&scores)[kStep / 8][4], int buffer, int step, int first,
                        float (&mass)[2]) const {
    const float factor = p_.scale * kLog2E;
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int lane = first + column(step, n, i), tracked = lane - q_.num_window;
        const float lse = sh_.lse[buffer][column(step, n, i)];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float weight = exp2f(scores[n][half * 2 + i] * factor - lse);
          if (tracked < 0) {
            mass[half] += weight;
          } else if (tracked < q_.num_tracked && q_.has_key(key_position(half))) {
            w_.recent[tracked_head(tracked) * p_.capacity + key_position(half)] = weight;
          }
        }
      }
    }
  }

  // Scores of old queries and old keys, and this warp's maximum and sum of them.
  __device__ void keep_old(const float (&scores)[kStep / 8][4], int step, int first) const {
    const float factor = p_.scale * kLog2E;
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int tracked = first + column(step, n, i);
        float score[2], top = -INFINITY, total = 0.0f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const bool is_valid = q_.has_key(key_position(half));
          score[half] = is_valid ? scores[n][half * 2 + i] * factor : -INFINITY;
          top = fmaxf(top, score[half]);
          if (is_valid && tracked < q_.num_tracked) {
            w_.old[tracked_head(tracked) * p_.capacity + key_position(half)] = score[half];
          }
        }
#pragma unroll
        for (int offset = 4; offset < kWarpSize; offset *= 2) {
          top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, offset));
        }
        if (top != -INFINITY) total = exp2f(score[0] - top) + exp2f(score[1] - top);
#pragma unroll
        for (int offset = 4; offset < kWarpSize; offset *= 2) {
          total += __shfl_xor_sync(kFullWarp, total, offset);
        }
        if (threadIdx.x % kWarpSize < 4) {
          sh_.softmax[warp][column(step, n, i)] = make_float2(top, total);
        }
      }
    }
  }

  __device__ void join_warps(int first, int count) const {
    __syncthreads();
    const int lane = static_cast<int>(threadIdx.x);
    if (lane >= count) return;
    float2 all = sh_.softmax[0][lane];
    for (int warp = 1; warp < kScanThreads / kWarpSize; ++warp) {
      all = join(all, sh_.softmax[warp][lane]);
    }
    w_.softmax[tracked_head(first + lane) * w_.num_key_blocks + blockIdx.x] = all;
  }

  __device__ int64_t tracked_head(int tracked) const {
    return (q_.first_tracked + tracked) * p_.num_heads + head_;
  }

  const DriftAttentionParams& p_;
  const Workspace& w_;
  const Sequence& q_;
  ScanShared<D>& sh_;
  int head_;
  int kv_head_;
  int position_;
  int num_now_;
  int num_old_;
};

template <int D>
__global__ void __launch_bounds__(kScanThreads, 2)
    drift_scan_kernel(const DriftAttentionParams p, const Workspace w) {
  extern __shared__ __align__(16) unsigned char memory[];
  if (!begin_scan(p, w)) return;
  const Sequence q(p, w, static_cast<int>(blockIdx.z));
  const Scan<D> scan(p, w, q, *reinterpret_cast<ScanShared<D>*>(memory));
  scan.copy_keys();
  scan.copy_chunk(0);
  scan.copy_old_keys();  // needed by the second chunk at the earliest
  scan.copy_chunk(1);

  uint32_t keys[D / 16][4];
  float mass[2] = {};
  const int num_chunks = scan.num_chunks();
  bool has_keys = false, has_old = false;
  for (int chunk = 0; chunk < num_chunks; ++chunk) {
    wait_copies<1>();
    __syncthreads();
    const bool is_old = chunk >= num_chunks - (q.num_tracked + kChunk - 1) / kChunk;
    if (!has_keys || (is_old && !has_old)) scan.load_keys(is_old, keys);
    has_keys = true, has_old = is_old;
    scan.scan_chunk(chunk, keys, mass);
    __syncthreads();  // its buffer is free
    scan.copy_chunk(chunk + 2);
  }
  scan.write_mass(mass);
  wait_copies<0>();
}

// ---- Launchers ----

template <class Kernel>
void launch_scan(Kernel* kernel, int num_threads, int64_t shared_bytes,
                 const DriftAttentionParams& p, const Workspace& w, Stream stream) {
  const dim3 grid(static_cast<unsigned int>(w.num_key_blocks),
                  static_cast<unsigned int>(p.num_heads),
                  static_cast<unsigned int>(p.num_sequences));
  allow_shared(kernel, shared_bytes, "drift_attention");
  kernel<<<grid, num_threads, static_cast<size_t>(shared_bytes), stream>>>(p, w);
  check_launch("drift_attention");
}

template <int D>
void launch_tensor_core_scan(const DriftAttentionParams& p, const Workspace& w, Stream stream) {
  launch_scan(drift_scan_kernel<D>, kScanThreads, sizeof(ScanShared<D>), p, w, stream);
}

bool has_tensor_core_form(const DriftAttentionParams& p) {
  const auto fits = [&](const void* x) { return are_vectors<bf16>({x}, {p.head_dim}); };
  return p.dtype == DType::kBFloat16 &&
         (p.head_dim == 32 || p.head_dim == 64 || p.head_dim == 128) && fits(p.q_cache) &&
         fits(p.k_cache) && fits(p.q_old) && fits(p.k_old);
}

template <class T>
void scan(const DriftAttentionParams& p, const Workspace& w, Stream stream) {
  if (!has_tensor_core_form(p)) {
    const int64_t floats = kBlockKeys * (p.head_dim + 1) + p.head_dim;
    launch_scan(drift_plain_scan_kernel<T>, kBlockKeys,
                floats * static_cast<int64_t>(sizeof(float)), p, w, stream);
  } else if (p.head_dim == 32) {
    launch_tensor_core_scan<32>(p, w, stream);
  } else if (p.head_dim == 64) {
    launch_tensor_core_scan<64>(p, w, stream);
  } else {
    launch_tensor_core_scan<128>(p, w, stream);
  }
}

}  // namespace
}  // namespace cuda::drift

namespace {

WindowAttentionParams attention_of(const DriftAttentionParams& p) {
  return {.dtype = p.dtype,
          .num_rows = p.num_rows,
          .num_heads = p.num_heads,
          .num_kv_heads = p.num_kv_heads,
          .head_dim = p.head_dim,
          .capacity = p.capacity,
          .scale = p.scale,
          .q_cache = p.q_cache,
          .k_cache = p.k_cache,
          .v_cache = p.v_cache,
          .rows = p.rows,
          .key_range = p.key_range,
          .out = p.out,
          .lse = p.lse,
          .workspace = p.workspace};
}

}  // namespace

// The attention is done with the workspace when the statistics begin.
int64_t drift_attention_workspace(const DriftAttentionParams& params) {
  cuda::drift::Workspace w;
  return std::max(window_attention_workspace(attention_of(params)),
                  cuda::drift::lay_out(params, nullptr, &w));
}

void drift_attention_cuda(const DriftAttentionParams& params, Stream stream) {
  if (params.num_sequences == 0 || params.num_heads == 0) return;
  window_attention_cuda(attention_of(params), stream);
  cuda::drift::Workspace w;
  cuda::drift::lay_out(params, params.workspace, &w);
  cuda::with_dtype(params.dtype,
                   [&](auto zero) { cuda::drift::scan<decltype(zero)>(params, w, stream); });
  const int64_t rows = std::clamp<int64_t>(w.max_tracked, 1, cuda::kDriftRowBlocks);
  const dim3 grid(static_cast<unsigned int>(w.num_key_blocks), static_cast<unsigned int>(rows + 1),
                  static_cast<unsigned int>(params.num_sequences));
  const auto shared_bytes = static_cast<size_t>(params.num_heads) * sizeof(float);
  cuda::drift::drift_compare_kernel<<<grid, cuda::drift::kBlockKeys, shared_bytes, stream>>>(params,
                                                                                             w);
  cuda::check_launch("drift_attention");
}

}  // namespace elastic_cache
