// Runs an op's kernel where its tensors are. A build without CUDA has no CUDA twins to link.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
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

// Launches a kernel that needs a workspace; torch's allocator keeps it until the stream is past it.
template <class Params>
void launch_with_workspace(const torch::stable::Tensor& tensor, Params params,
                           int64_t (*workspace_bytes)(const Params&),
                           void (*kernel)(const Params&, Stream)) {
  const CurrentStream stream(tensor);
  const torch::stable::Tensor workspace = torch::stable::new_empty(
      tensor, {workspace_bytes(params)}, torch::headeronly::ScalarType::Byte);
  params.workspace = workspace.mutable_data_ptr();
  kernel(params, stream);
}

#define ELASTIC_CACHE_LAUNCH(op, tensor, ...)        \
  do {                                               \
    if ((tensor).is_cuda()) {                        \
      op##_cuda(__VA_ARGS__, CurrentStream(tensor)); \
    } else {                                         \
      op##_cpu(__VA_ARGS__);                         \
    }                                                \
  } while (false)

#define ELASTIC_CACHE_LAUNCH_WITH_WORKSPACE(op, tensor, params)         \
  do {                                                                  \
    if ((tensor).is_cuda()) {                                           \
      launch_with_workspace(tensor, params, op##_workspace, op##_cuda); \
    } else {                                                            \
      op##_cpu(params);                                                 \
    }                                                                   \
  } while (false)
#else
#define ELASTIC_CACHE_LAUNCH(op, tensor, ...) op##_cpu(__VA_ARGS__)
#define ELASTIC_CACHE_LAUNCH_WITH_WORKSPACE(op, tensor, params) op##_cpu(params)
#endif

}  // namespace elastic_cache::ops
