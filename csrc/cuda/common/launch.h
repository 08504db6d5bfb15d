// What every launcher needs: the dtype as a C++ type, and a launch that reports its error.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "elastic_cache/types.h"

namespace elastic_cache::cuda {

// Calls f with a value of the C++ type that stores `dtype`.
template <class F>
void with_dtype(DType dtype, const F& f) {
  if (dtype == DType::kBFloat16) {
    f(__nv_bfloat16{});
  } else {
    f(float{});
  }
}

// After a launch: a configuration the device refuses is an error of this call, not of a later one.
inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(kernel) +
                             ": the kernel could not be launched: " + cudaGetErrorString(error));
  }
}

// Lets `kernel` have more dynamic shared memory than the 48 KB every kernel may have.
template <class Kernel>
void allow_shared(Kernel* kernel, int64_t bytes, const char* op) {
  if (bytes <= 48 * 1024) return;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it would be reported again by the next launch
  throw std::runtime_error(std::string(op) + ": head_dim is too large: a block would need " +
                           std::to_string(bytes) + " bytes of shared memory");
}

inline unsigned int blocks_for(int64_t items, int64_t per_block) {
  return static_cast<unsigned int>((items + per_block - 1) / per_block);
}

}  // namespace elastic_cache::cuda
