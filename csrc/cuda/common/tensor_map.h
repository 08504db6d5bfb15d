// Descriptions of bfloat16 arrays for the copy engine (compute capability 9.0).
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <array>
#include <stdexcept>
#include <string>

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

}  // namespace elastic_cache::cuda
