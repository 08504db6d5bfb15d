// Runs an op's kernel where its tensors are. A build without CUDA has no CUDA twins to link.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "elastic_cache/types.h"

namespace elastic_cache::ops {

#ifdef ELASTIC_CACHE_CUDA
// The stream torch is using on the tensor's device, with that device made current.
class CurrentStream {
 public:
  explicit CurrentStream(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<Stream>(stream);
  }
  operator Stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Stream stream_ = nullptr;
};

#define ELASTIC_CACHE_LAUNCH(op, tensor, ...)        \
  do {                                               \
    if ((tensor).is_cuda()) {                        \
      op##_cuda(__VA_ARGS__, CurrentStream(tensor)); \
    } else {                                         \
      op##_cpu(__VA_ARGS__);                         \
    }                                                \
  } while (false)
#else
#define ELASTIC_CACHE_LAUNCH(op, tensor, ...) op##_cpu(__VA_ARGS__)
#endif

}  // namespace elastic_cache::ops
