// Descriptions of bfloat16 arrays for the copy engine (compute capability 9.0).
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <array>
#include <climits>
#include <stdexcept>
#include <string>

#include "common/heuristics.h"
#include "common/launch.h"
#include "common/wgmma.cuh"

namespace elastic_cache::cuda {

using EncodeTensorMap = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found without linking the driver; null where it has none.
inline EncodeTensorMap encode_tensor_map() {
  static const EncodeTensorMap encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                     &found);
    return reinterpret_cast<EncodeTensorMap>(function);
  }();
  return encode;
}

// Of an array with `sizes`, the fastest first, rows of further dimensions `strides` bytes apart, of
// which `box` is copied at a time. Rows of 128 bytes, swizzled as wgmma.cuh wants operands; what a
// box has beyond the array becomes zero.
template <size_t kRank>
CUtensorMap tensor_map(const char* op, const void* base, const std::array<cuuint64_t, kRank>& sizes,
                       const std::array<cuuint64_t, kRank - 1>& strides,
                       const std::array<cuuint32_t, kRank>& box) {
  std::array<cuuint32_t, kRank> ones;
  ones.fill(1);
  CUtensorMap map;
  const CUresult error =
      encode_tensor_map()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kRank, const_cast<void*>(base),
                          sizes.data(), strides.data(), box.data(), ones.data(),
                          CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                          CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error != CUDA_SUCCESS) {
    throw std::runtime_error(std::string(op) + ": cuTensorMapEncodeTiled failed with error " +
                             std::to_string(error));
  }
  return map;
}

// Whether the current device has the copy engine and products that the maps are for.
inline bool has_tensor_maps() {
  return DeviceLimits::current().has_wgmma && encode_tensor_map() != nullptr;
}

// Whether it can copy tiles of a cache: the engine counts slots in 32 bits, and from one on.
inline bool has_cache_map(int64_t num_slots) {
  return has_tensor_maps() && num_slots > 0 && num_slots <= INT_MAX;
}

// A cache [num_slots, num_kv_heads, D] as [num_kv_heads D / 64][num_slots][64]: one copy brings
// kTileKeys keys of a head.
template <int D>
CUtensorMap cache_map(const char* op, const void* cache, int64_t num_slots, int64_t num_kv_heads) {
  constexpr cuuint64_t kColumns = wgmma::kBlockColumns;
  const auto slots = static_cast<cuuint64_t>(num_slots);
  const auto width = static_cast<cuuint64_t>(num_kv_heads) * D;
  return tensor_map<3>(op, cache, {kColumns, slots, width / kColumns},
                       {width * sizeof(__nv_bfloat16), wgmma::kBlockRowBytes},
                       {kColumns, kTileKeys, D / kColumns});
}

}  // namespace elastic_cache::cuda
