// The statistics kernel of drift_tensor_cores.cuh with a warpgroup's products (compute capability
// 9.0): 64 keys times the 48 lanes of a pass, both read by the tensor cores from shared memory. The
// copies of a head's keys and queries run while the weights of the head before are computed.
//
// A thread has two keys, `half` of them lane / 4 + 8 half of its warp's 16, and four lanes of each
// kind: lane % 4 * 2 + {0, 1} and eight further. So old and present weights of a tracked row meet
// in a thread. Overwritten keys as they were are one more operand, multiplied with the old lanes.
#pragma once

#include "common/hopper.cuh"
#include "common/wgmma.cuh"
#include "drift_tensor_cores.cuh"

namespace elastic_cache::cuda::drift {

template <int D>
struct WgmmaStatisticsShared {
  wgmma::Rows<kTileKeys, D> keys;
  wgmma::Rows<kTileKeys, D> old_keys;  // of overwritten keys alone
  wgmma::Rows<kLanes, D> queries;
  alignas(16) float lse[kLanes];
  const bf16* from[kLanes];
  int32_t old_rows[kTileKeys];  // of k_old, -1 for a key that was not overwritten
  double reduced[kNumWarps];
  uint64_t has_keys;  // a barrier
};
// What a block asks for; its first 1024 bytes may be lost to alignment.
template <int D>
inline constexpr size_t kWgmmaStatisticsBytes = sizeof(WgmmaStatisticsShared<D>) + 1024;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <int D>
class WgmmaKeyBlock {
 public:
  __device__ WgmmaKeyBlock(const DriftStatisticsParams& p, const Layout& layout, const Sequence& q,
                           int layer, int first, const CUtensorMap* key_map,
                           WgmmaStatisticsShared<D>& sh)
      : p_(p),
        layout_(layout),
        q_(q),
        layer_(layer),
        first_(first),
        key_map_(key_map),
        sh_(sh),
        has_old_(find_old_rows(p, q, first, sh.old_rows)) {}

  // Mass of this thread's keys, over its rows; the cosines of its rows and keys.
  __device__ double run(float (&mass)[2]) const {
    double cosines = 0.0;
    int parity = 0;
    const int num_heads = static_cast<int>(p_.num_heads);
    for (int pass = 0; pass < q_.num_passes(); ++pass) {
      find_queries(p_, q_, pass, sh_.from);
      __syncthreads();
      copy_head(pass, 0);
      Products products[2][4];
      for (int head = 0; head < num_heads; ++head, parity ^= 1) {
        wait_copies<0>();
        wgmma::publish_operands();
        __syncthreads();
        wait_barrier(shared_address(&sh_.has_keys), parity);
        float score[kLanes / 8][4];
        multiply(score);
        float2 log_sums[kLanes / 8];
        load_log_sums(log_sums);
        __syncthreads();  // the buffers are free
        if (head + 1 < num_heads) copy_head(pass, head + 1);
        add_head(score, log_sums, mass, products);
      }
      cosines += sum_cosines(products);
      __syncthreads();
    }
    return cosines;
  }

  // Position of a key of this thread.
  __device__ int position(int half) const { return first_ + key(half); }
  __device__ bool is_valid(int half) const {
    return position(half) >= q_.first_key && position(half) < q_.end_key;
  }

 private:
  __device__ static int key(int half) {
    const Place at;
    return at.warp * kKeysPerWarp + half * 8 + at.row;
  }

  // Starts copying what the 48 lanes of a head need.
  __device__ void copy_head(int pass, int head) const {
    const int kv_head = head / q_.group;
    if (threadIdx.x == 0) {
      const uint32_t barrier = shared_address(&sh_.has_keys);
      expect_bytes(barrier, sizeof(sh_.keys));
      copy_box(shared_address(&sh_.keys), key_map_, barrier, 0,
               static_cast<int>(q_.first_cached) + first_, kv_head * (D / wgmma::kBlockColumns),
               evict_first_policy());
    }
    copy_queries<D, kLanes>(p_, sh_.from, head, 0,
                            [&](int lane, int column) { return sh_.queries.at(lane, column); });
    if (has_old_) {
      copy_old_keys<D>(p_, q_, kv_head, sh_.old_rows,
                       [&](int key, int column) { return sh_.old_keys.at(key, column); });
    }
    copy_log_sums(layout_.lse + lse_index(p_, layout_, layer_, q_.index, pass, head), sh_.lse);
    commit_copies();
  }

  // The scores of all lanes; old ones see overwritten keys as they were.
  __device__ __forceinline__ void multiply(float (&score)[kLanes / 8][4]) const {
    float before[kPassRows / 8][4];
    const uint32_t keys = shared_address(&sh_.keys), old_keys = shared_address(&sh_.old_keys);
    const uint32_t queries = shared_address(&sh_.queries);
    wgmma::begin();
#pragma unroll
    for (int d = 0; d < D; d += 16) {
      const int block = d / wgmma::kBlockColumns, offset = d % wgmma::kBlockColumns * 2;
      const uint32_t key_at = block * decltype(sh_.keys)::kBlockBytes + offset;
      const uint32_t query_at = block * decltype(sh_.queries)::kBlockBytes + offset;
      const uint32_t old_at = query_at + kOldLanes * wgmma::kBlockRowBytes;
      wgmma::multiply_transposed(score, wgmma::operand<0>(keys + key_at),
                                 wgmma::operand<0>(queries + query_at), d > 0);
      wgmma::multiply_transposed(before, wgmma::operand<0>(old_keys + key_at),
                                 wgmma::operand<0>(queries + old_at), d > 0);
    }
    wgmma::commit();
    wgmma::wait<0>();
    wgmma::hold(score);
    wgmma::hold(before);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (sh_.old_rows[key(half)] < 0) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        score[kOldLanes / 8 + i / 2][half * 2 + i % 2] = before[i / 2][half * 2 + i % 2];
      }
    }
  }

  __device__ void load_log_sums(float2 (&log_sums)[kLanes / 8]) const {
    const int column = static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
    for (int n = 0; n < kLanes / 8; ++n) {
      log_sums[n] = *reinterpret_cast<const float2*>(&sh_.lse[n * 8 + column]);
    }
  }

  __device__ __forceinline__ void add_head(const float (&score)[kLanes / 8][4],
                                           const float2 (&log_sums)[kLanes / 8], float (&mass)[2],
                                           Products (&products)[2][4]) const {
    const float factor = p_.scale * kLog2E;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Of the i-th of this thread's four lanes of a kind.
      const auto weight = [&](int first_lane, int i) {
        const int n = first_lane / 8 + i / 2;
        const float log_sum = i % 2 == 0 ? log_sums[n].x : log_sums[n].y;
        return exp2_flush(score[n][half * 2 + i % 2] * factor - log_sum);
      };
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        mass[half] += weight(kWindowLanes, i);
        products[half][i].add(weight(kOldLanes, i), weight(kTrackedLanes, i));
      }
    }
  }

  __device__ double sum_cosines(const Products (&products)[2][4]) const {
    double total = 0.0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!is_valid(half)) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int lane = i / 2 * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2;
        if (sh_.from[kTrackedLanes + lane] != nullptr) total += products[half][i].cosine();
      }
    }
    return total;
  }

  const DriftStatisticsParams& p_;
  const Layout& layout_;
  const Sequence& q_;
  int layer_;
  int first_;
  const CUtensorMap* key_map_;
  WgmmaStatisticsShared<D>& sh_;
  bool has_old_;  // whether any of the keys was overwritten
};
#endif

// blockIdx = (key / 64, sequence, layer).
template <int D>
__global__ void __launch_bounds__(kNumThreads, kBlocksPerSm)
    statistics_wgmma_kernel(const __grid_constant__ CUtensorMap key_map,
                            const DriftStatisticsParams p, const Layout layout) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(16) unsigned char memory[];
  auto& sh = *reinterpret_cast<WgmmaStatisticsShared<D>*>(
      memory + (1024 - shared_address(memory) % 1024) % 1024);
  if (threadIdx.x == 0) {
    prefetch_map(&key_map);
    init_barrier(shared_address(&sh.has_keys), 1);
    publish_barriers();
  }
  wait_for_previous();
  const int s = static_cast<int>(blockIdx.y), layer = static_cast<int>(blockIdx.z);
  const Sequence q(p, layer, s);
  const int first = static_cast<int>(blockIdx.x) * kTileKeys;
  const WgmmaKeyBlock<D> keys(p, layout, q, layer, first, &key_map, sh);
  float mass[2] = {};
  double cosines = 0.0;
  if (max(first, q.first_key) < min(first + kTileKeys, q.end_key)) cosines = keys.run(mass);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    mass[half] += __shfl_xor_sync(kFullWarp, mass[half], 1);
    mass[half] += __shfl_xor_sync(kFullWarp, mass[half], 2);
    const int position = keys.position(half);
    if (threadIdx.x % 4 == 0 && position < p.capacity) {
      p.mass[q.first_cached + position] = keys.is_valid(half) ? mass[half] : 0.0f;
    }
  }
  store_cosines(p, layout, cosines, sh.reduced);
#endif
}

}  // namespace elastic_cache::cuda::drift
