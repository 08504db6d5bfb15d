// Chooses a form of stream_linear.cuh and launches it.
#include "stream_linear.h"

#include <algorithm>
#include <array>

#include "common/heuristics.h"
#include "common/launch.h"
#include "common/tensor_map.h"
#include "common/vector.cuh"
#include "stream_linear.cuh"

namespace elastic_cache::cuda {
namespace {

using namespace stream;

// The gated form's p.out is [R, N / 2].
template <class F>
void launch_form(const LinearParams& p, Begin begin, Stream stream) {
  const auto rows = static_cast<cuuint64_t>(p.num_rows);
  const auto k = static_cast<cuuint64_t>(p.in_features);
  const auto n = static_cast<cuuint64_t>(p.out_features);
  // weight [K, N] as [N / 64][K][64]: one copy brings a stage of all the blocks of a tile (gated:
  // of one block).
  const CUtensorMap weights = tensor_map<3>(
      "linear", p.weight, {kBlockColumns, k, n / kBlockColumns},
      {static_cast<cuuint64_t>(p.weight_row_stride) * sizeof(bf16), kBlockColumns * sizeof(bf16)},
      {kBlockColumns, kDepth, F::kIsGated ? 1 : F::kBlocks});
  // Rows that x does not have become zero.
  const CUtensorMap inputs =
      tensor_map<2>("linear", p.x, {k, rows},
                    {static_cast<cuuint64_t>(p.x_row_stride) * sizeof(bf16)}, {kDepth, F::kRows});
  const int64_t num_columns = F::kIsGated ? p.out_features / 2 : p.out_features;
  const auto num_tiles = static_cast<int>(blocks_for(num_columns, F::kBlocks * kBlockColumns));
  const auto num_chunks = static_cast<int>(blocks_for(p.num_rows, F::kRows));
  const int num_items = num_tiles * num_chunks;
  const int num_blocks =
      F::kCluster > 1 ? num_items * F::kCluster : std::min(num_items, kStreamBlocks);
  const Problem problem{.out = static_cast<bf16*>(p.out),
                        .bias = static_cast<const bf16*>(p.bias),
                        .num_rows = static_cast<int>(p.num_rows),
                        .num_columns = static_cast<int>(num_columns),
                        .num_steps = static_cast<int>(p.in_features / kDepth),
                        .num_chunks = num_chunks,
                        .num_items = num_items,
                        .window = std::min(kWindowBytes / F::kWeightBytes, F::kStages)};
  launch(begin, "linear", stream_kernel<F>, dim3(static_cast<unsigned int>(num_blocks)),
         F::kThreads, stream, SharedBytes{F::kSharedBytes}, ClusterSize{F::kCluster}, weights,
         inputs, problem);
}

// The form for the fewest rows that are enough for all, or for one of as few chunks as will do.
template <int kBlocks, int kSplits, bool kIsGated, int kRows = 16>
void launch_rows(const LinearParams& p, Begin begin, Stream stream) {
  if constexpr (kRows < kMaxRows) {
    constexpr int kNext = kRows + (kRows < 128 ? 16 : 32);
    const int64_t num_chunks = blocks_for(p.num_rows, kMaxRows);
    if (p.num_rows > kRows * num_chunks) {
      return launch_rows<kBlocks, kSplits, kIsGated, kNext>(p, begin, stream);
    }
  }
  launch_form<Form<kRows, kBlocks, kSplits, kIsGated>>(p, begin, stream);
}

// Up to so many rows swiglu is a kernel of its own: the product after it reads its weights ahead
// meanwhile, which hides it [an H100, microseconds a layer without and with the gated form: 154.0,
// 154.7 at 16 rows, 155.5, 155.7 at 32, 158.2, 157.9 at 48].
constexpr int64_t kMaxRowsApart = 48;

}  // namespace

bool can_stream(const LinearParams& p) {
  return has_tensor_maps() && p.dtype == DType::kBFloat16 && p.num_rows > 0 && p.in_features > 0 &&
         p.out_features > 0 &&
         are_vectors<bf16>({p.x, p.weight, p.out}, {p.x_row_stride, p.weight_row_stride}) &&
         p.in_features % kDepth == 0 && p.out_features % kBlockColumns == 0;
}

bool stream_linear(const LinearParams& params, Begin begin, Stream stream) {
  if (!can_stream(params)) return false;
  const int64_t tiles = blocks_for(params.out_features, 3 * kBlockColumns);
  const int64_t steps = params.in_features / kDepth;
  if (tiles > kStreamBlocks / 2 || steps < 3) {
    launch_rows<3, 1, false>(params, begin, stream);
  } else if (tiles > kStreamBlocks / 3) {
    launch_rows<3, 2, false>(params, begin, stream);
  } else {
    launch_rows<2, 3, false>(params, begin, stream);
  }
  return true;
}

bool stream_gated_linear(const LinearParams& gate_up, void* out, Stream stream) {
  LinearParams p = gate_up;
  p.out = out;
  const int64_t tiles = blocks_for(p.out_features, 3 * kBlockColumns);
  const bool is_one_wave = tiles > kStreamBlocks / 2 && tiles <= kStreamBlocks;
  if (!can_stream(p) || !is_one_wave || p.num_rows <= kMaxRowsApart ||
      p.out_features % (2 * kBlockColumns) != 0) {
    return false;
  }
  launch_rows<3, 1, true, kMaxRowsApart + 16>(p, Begin::kEarly, stream);
  return true;
}

}  // namespace elastic_cache::cuda
