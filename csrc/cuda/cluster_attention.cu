// window_attention and the statistics of drift_attention in one kernel, for devices with clusters
// of thread blocks.
//
// A cluster has the keys of one key/value head of one sequence, a block an even share of them: all
// its K and V are on their way before anything is computed, and stay in shared memory for all rows.
// Blocks exchange maximum and sum of every lane, so that weights are final when they are made:
//   p = exp2(score - lse) -> out, column mass, p_new of tracked rows; the same of old queries and
//   keys -> p_old. What needs all heads is left to drift_cluster_compare.cuh.
// The subtle thing: how keys are shared out depends on the capacity and the key range alone, and a
// lane goes through the same sums wherever in the row list it is.
#include "cluster_attention.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <stdexcept>
#include <string>

#include "cluster_attention_block.cuh"
#include "common/launch.h"
#include "common/vector.cuh"

namespace elastic_cache::cuda::cluster {
namespace {

template <int D, int W, bool kDrift>
__global__ void __launch_bounds__(W* kWarpSize, W == 4 ? 2 : 1)
    cluster_attention_kernel(const __grid_constant__ DriftAttentionParams p,
                             const __grid_constant__ Workspace w) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) unsigned char memory[];
  Block<D, W, kDrift>(p, w, *reinterpret_cast<Shared<D, W>*>(memory)).run();
#endif
}

template <class Kernel>
void allow(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  if (cudaFuncSetAttribute(kernel, attribute, value) == cudaSuccess) return;
  cudaGetLastError();  // what it means is said by the launch, or by fits
}

// A launch of `ranks` blocks a cluster, and its attribute, which must stay where it is.
struct Launch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute cluster{};

  template <class Kernel>
  Launch(Kernel* kernel, const DriftAttentionParams& p, const ClusterShape& shape, size_t bytes) {
    allow(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    allow(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (shape.ranks > 8) allow(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    const auto ranks = static_cast<unsigned int>(shape.ranks);
    config.gridDim = dim3(ranks, static_cast<unsigned int>(p.num_kv_heads),
                          static_cast<unsigned int>(p.num_sequences));
    config.blockDim = dim3(static_cast<unsigned int>(shape.warps * kWarpSize));
    config.dynamicSmemBytes = bytes;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {ranks, 1, 1};
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  Launch(const Launch&) = delete;
};

// f(D, W) as compile-time constants.
template <class F>
void with_form(const DriftAttentionParams& p, const ClusterShape& shape, const F& f) {
  const auto with_warps = [&]<int D>() {
    if (shape.warps == 4) return f.template operator()<D, 4>();
    f.template operator()<D, 8>();
  };
  if (p.head_dim == 32) return with_warps.template operator()<32>();
  if (p.head_dim == 64) return with_warps.template operator()<64>();
  with_warps.template operator()<128>();
}

// Whether the current device can run such clusters. Code for an older architecture has none, even
// if it runs on a newer device; part of a device may be too small for a cluster of sixteen.
template <int D, int W>
bool fits(const DriftAttentionParams& p, const ClusterShape& shape) {
  constexpr int kMaxDevices = 64;
  enum : signed char { kUnknown, kNo, kYes };
  static std::array<std::array<std::atomic<signed char>, kMaxDevices>, 2> known{};
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices) {
    cudaGetLastError();
    return false;
  }
  std::atomic<signed char>& answer = known[shape.ranks > 8 ? 1 : 0][static_cast<size_t>(device)];
  if (answer == kUnknown) {
    auto* kernel = cluster_attention_kernel<D, W, true>;
    cudaFuncAttributes attributes{};
    bool is_possible =
        cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
    if (is_possible) {
      const Launch launch(kernel, p, shape, sizeof(Shared<D, W>));
      int clusters = 0;
      is_possible =
          cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config) == cudaSuccess &&
          clusters > 0;
    }
    cudaGetLastError();  // a refusal is an answer, not an error of the next launch
    answer = is_possible ? kYes : kNo;
  }
  return answer == kYes;
}

template <bool kDrift>
void launch(const DriftAttentionParams& p, const Workspace& w, Stream stream) {
  const ClusterShape shape = cluster_shape(p.capacity);
  with_form(p, shape, [&]<int D, int W>() {
    auto* kernel = cluster_attention_kernel<D, W, kDrift>;
    Launch launch(kernel, p, shape, sizeof(Shared<D, W>));
    launch.config.stream = stream;
    cudaLaunchKernelEx(&launch.config, kernel, p, w);
    check_launch(kDrift ? "drift_attention" : "window_attention");
  });
}

DriftAttentionParams widen(const WindowAttentionParams& p) {
  return {.dtype = p.dtype,
          .num_sequences = p.num_sequences,
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
          .lse = p.lse};
}

}  // namespace

int64_t lay_out(const DriftAttentionParams& p, void* memory, Workspace* w) {
  const int64_t tracked = drift::max_tracked(p);
  const int64_t blocks = std::max<int64_t>((p.capacity + kCompareKeys - 1) / kCompareKeys, 1);
  const int64_t stride = (p.capacity + 7) / 8 * 8;
  auto* at = static_cast<unsigned char*>(memory);
  int64_t bytes = 0;
  const auto take = [&]<class T>(T*& array, int64_t count) {
    array = reinterpret_cast<T*>(at + bytes);
    bytes += count * static_cast<int64_t>(sizeof(T));
  };
  take(w->cosines, tracked * blocks);
  take(w->recent, tracked * p.num_heads * stride);
  take(w->old, tracked * p.num_heads * stride);
  take(w->mass, p.num_kv_heads * p.num_sequences * stride);
  take(w->finished, p.num_sequences);
  w->max_tracked = static_cast<int>(tracked);
  w->num_key_blocks = static_cast<int>(blocks);
  w->stride = static_cast<int>(stride);
  return bytes;
}

bool takes(const WindowAttentionParams& p) {
  constexpr int64_t kMaxGrid = 65535;
  const auto is_vector = [&](const void* x) { return are_vectors<bf16>({x}, {p.head_dim}); };
  const ClusterShape shape = cluster_shape(p.capacity);
  if (p.dtype != DType::kBFloat16 || shape.warps == 0) return false;
  if (p.head_dim != 32 && p.head_dim != 64 && p.head_dim != 128) return false;
  if (p.num_sequences < 1 || p.num_sequences > kMaxGrid || p.num_kv_heads > kMaxGrid) return false;
  if (!is_vector(p.q_cache) || !is_vector(p.k_cache) || !is_vector(p.v_cache)) return false;
  if (!is_vector(p.out)) return false;
  const DriftAttentionParams sizes = widen(p);
  bool holds = false;
  with_form(sizes, shape, [&]<int D, int W>() { holds = fits<D, W>(sizes, shape); });
  return holds;
}

void attend(const WindowAttentionParams& p, Stream stream) {
  const int64_t width = p.num_heads * p.head_dim;
  for (int64_t first = 0; first < p.num_rows; first += kClusterRows) {
    DriftAttentionParams some = widen(p);
    some.num_rows = std::min<int64_t>(p.num_rows - first, kClusterRows);
    some.rows += first;
    some.out = static_cast<bf16*>(some.out) + first * width;
    some.lse += first * p.num_heads;
    launch<false>(some, {}, stream);
  }
}

void attend(const DriftAttentionParams& p, const Workspace& w, Stream stream) {
  launch<true>(p, w, stream);
}

}  // namespace elastic_cache::cuda::cluster
