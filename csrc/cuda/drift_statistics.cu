// Column mass of the window rows and the cosine over heads, old against new, of some layers at
// once:
//   log_sum     log-sum-exp of every lane (drift_lanes.cuh says what that is), unless attention has
//               given it
//   statistics  K once more, now with the log-sum-exps: weights, their sums and products over heads
//   similarity  adds the blocks' sums of cosines in order
// Reading K twice costs less than keeping the scores of one pass: those are as many bytes, to write
// and to read. Read drift_plain.cuh first; drift_tensor_cores.cuh is the form for bfloat16.
#include "elastic_cache/drift_statistics.h"

#include <algorithm>

#include "common/tensor_map.h"
#include "drift_plain.cuh"
#include "drift_tensor_cores.cuh"
#include "drift_wgmma.cuh"

namespace elastic_cache {
namespace {

using namespace cuda::drift;
using cuda::kTileKeys;

bool has_tensor_core_form(const DriftStatisticsParams& p) {
  const auto fits = [&](const void* x) { return cuda::are_vectors<bf16>({x}, {p.head_dim}); };
  return p.dtype == DType::kBFloat16 &&
         (p.head_dim == 32 || p.head_dim == 64 || p.head_dim == 128) && fits(p.q_cache) &&
         fits(p.k_cache) && fits(p.q_old) && fits(p.k_old);
}

// Lays the arrays out from `memory` on.
Layout lay_out(const DriftStatisticsParams& p, void* memory, int64_t* num_bytes) {
  const int64_t block_keys = has_tensor_core_form(p) ? kTileKeys : kPlainWarps;
  const int64_t passes = std::max<int64_t>((p.num_rows + kPassRows - 1) / kPassRows, 1);
  const int64_t blocks = std::max<int64_t>((p.capacity + block_keys - 1) / block_keys, 1);
  const int64_t sequences = p.num_layers * p.num_sequences;
  const int64_t num_lse = sequences * passes * p.num_heads * kLanes;
  *num_bytes = num_lse * static_cast<int64_t>(sizeof(float)) +
               sequences * blocks * static_cast<int64_t>(sizeof(double));
  auto* lse = static_cast<float*>(memory);
  return {.lse = lse,
          .cosines = reinterpret_cast<double*>(lse + num_lse),
          .num_passes = static_cast<int>(passes),
          .num_blocks = static_cast<int>(blocks)};
}

// A warp a sequence of a layer.
__global__ void similarity_kernel(const DriftStatisticsParams p, const Layout layout) {
  cuda::wait_for_previous();
  const int s = static_cast<int>(blockIdx.x), layer = static_cast<int>(blockIdx.y);
  const int lane = static_cast<int>(threadIdx.x);
  const Sequence q(p, layer, s);
  int tracked = 0;
  for (int i = lane; i < q.num_tracked; i += cuda::kWarpSize) {
    tracked += p.rows[q.begin + i] >= 0 ? 1 : 0;
  }
  const int64_t at = int64_t{layer} * p.num_sequences + s;
  double total = 0.0;
  for (int i = lane; i < layout.num_blocks; i += cuda::kWarpSize) {
    total += layout.cosines[at * layout.num_blocks + i];
  }
  tracked = cuda::warp_reduce(tracked, cuda::Sum{});
  total = cuda::warp_reduce(total, cuda::Sum{});
  const double count = static_cast<double>(tracked) * (q.end_key - q.first_key);
  if (lane == 0) p.similarity[at] = count > 0.0 ? total / count : double{INFINITY};
}

constexpr const char* kOp = "drift_statistics";

template <int D>
void launch_tensor_cores(const DriftStatisticsParams& p, const Layout& layout, dim3 grid,
                         Stream stream) {
  const int64_t tiles = 2 + p.capacity / kTileKeys + p.num_rows / kTileKeys;
  const size_t marks = static_cast<size_t>(tiles) * kTileWords * sizeof(uint32_t);
  const int64_t num_kinds = p.lse != nullptr ? 1 : kLanes / kPassRows;
  cuda::launch_overlapping(kOp, log_sum_kernel<D>,
                           dim3(static_cast<unsigned int>(num_kinds * p.num_heads), grid.y, grid.z),
                           kNumThreads, stream, cuda::SharedBytes{sizeof(LogSumShared<D>) + marks},
                           p, layout);
  if constexpr (D % cuda::wgmma::kBlockColumns == 0) {
    const int64_t num_slots = p.num_layers * p.num_sequences * p.capacity;
    if (cuda::has_cache_map(num_slots)) {
      cuda::launch_overlapping(kOp, statistics_wgmma_kernel<D>, grid, kNumThreads, stream,
                               cuda::SharedBytes{kWgmmaStatisticsBytes<D>},
                               cuda::cache_map<D>(kOp, p.k_cache, num_slots, p.num_kv_heads), p,
                               layout);
      return;
    }
  }
  cuda::launch_overlapping(kOp, statistics_kernel<D>, grid, kNumThreads, stream,
                           cuda::SharedBytes{sizeof(StatisticsShared<D>)}, p, layout);
}

template <class T>
void launch_plain(const DriftStatisticsParams& p, const Layout& layout, dim3 grid, Stream stream) {
  const int64_t items = layout.num_passes * p.num_heads * kLanes;
  cuda::launch_overlapping(kOp, plain_log_sum_kernel<T>,
                           dim3(cuda::blocks_for(items, kPlainWarps), grid.y, grid.z),
                           kPlainWarps * cuda::kWarpSize, stream, p, layout);
  cuda::launch_overlapping(kOp, plain_statistics_kernel<T>, grid, kPlainWarps * cuda::kWarpSize,
                           stream, p, layout);
}

}  // namespace

int64_t drift_statistics_workspace(const DriftStatisticsParams& params) {
  int64_t num_bytes = 0;
  lay_out(params, nullptr, &num_bytes);
  return num_bytes;
}

void drift_statistics_cuda(const DriftStatisticsParams& params, Stream stream) {
  if (params.num_layers == 0 || params.num_sequences == 0 || params.num_heads == 0) return;
  int64_t num_bytes = 0;
  const Layout layout = lay_out(params, params.workspace, &num_bytes);
  const dim3 grid(static_cast<unsigned int>(layout.num_blocks),
                  static_cast<unsigned int>(params.num_sequences),
                  static_cast<unsigned int>(params.num_layers));
  if (!has_tensor_core_form(params)) {
    cuda::with_dtype(params.dtype, [&](auto zero) {
      launch_plain<decltype(zero)>(params, layout, grid, stream);
    });
  } else if (params.head_dim == 32) {
    launch_tensor_cores<32>(params, layout, grid, stream);
  } else if (params.head_dim == 64) {
    launch_tensor_cores<64>(params, layout, grid, stream);
  } else {
    launch_tensor_cores<128>(params, layout, grid, stream);
  }
  cuda::launch_overlapping(kOp, similarity_kernel, dim3(grid.y, grid.z), cuda::kWarpSize, stream,
                           params, layout);
}

}  // namespace elastic_cache
