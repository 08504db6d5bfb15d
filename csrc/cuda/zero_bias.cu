// Device variables start as zeros, on every device, when the module is loaded.
#include "zero_bias.h"

#include <cuda_runtime.h>

namespace elastic_cache::cuda {
namespace {

constexpr int64_t kBytes = 128 * 1024;  // 65,536 bfloat16: wider than any layer's product
__device__ __align__(256) unsigned char zeros[kBytes];

}  // namespace

void* zero_bias(int64_t bytes) {
  void* address = nullptr;
  if (bytes > kBytes || cudaGetSymbolAddress(&address, zeros) != cudaSuccess) {
    cudaGetLastError();  // it would be reported again by the next launch
    return nullptr;
  }
  return address;
}

}  // namespace elastic_cache::cuda
