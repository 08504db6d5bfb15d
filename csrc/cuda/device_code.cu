// Which GPUs this build has code for. The subtle thing: a list of architectures does not tell, as
// PTX in the build runs on newer GPUs, so the runtime is asked for a kernel that was compiled like
// all others. C names: Python finds them by ctypes, and a build without CUDA simply lacks them.
#include <cuda_runtime.h>

#define ELASTIC_CACHE_TEXT_OF(...) #__VA_ARGS__
#define ELASTIC_CACHE_TEXT(...) ELASTIC_CACHE_TEXT_OF(__VA_ARGS__)

namespace elastic_cache::cuda {
namespace {

__global__ void device_code_kernel() {}

}  // namespace
}  // namespace elastic_cache::cuda

extern "C" {

// The architectures nvcc compiled for, ten times their number: "800,900". Says nothing of PTX.
__attribute__((visibility("default"))) const char* elastic_cache_cuda_archs() {
  return ELASTIC_CACHE_TEXT(__CUDA_ARCH_LIST__);
}

// Whether a GPU can run the kernels, 1 or 0; -1 if it cannot be asked.
__attribute__((visibility("default"))) int elastic_cache_has_cuda_code(int device) {
  int before = 0;
  if (cudaGetDevice(&before) != cudaSuccess || cudaSetDevice(device) != cudaSuccess) {
    cudaGetLastError();  // it would be reported again by the next launch
    return -1;
  }
  cudaFuncAttributes attributes;
  const cudaError_t error =
      cudaFuncGetAttributes(&attributes, elastic_cache::cuda::device_code_kernel);
  cudaGetLastError();
  cudaSetDevice(before);
  if (error == cudaSuccess) return 1;
  const bool is_missing =
      error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
      error == cudaErrorUnsupportedPtxVersion || error == cudaErrorInvalidKernelImage;
  return is_missing ? 0 : -1;
}

}  // extern "C"
