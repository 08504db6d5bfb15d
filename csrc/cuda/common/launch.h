// What every launcher needs: the dtype as a C++ type, and a launch that reports its error and may
// overlap the end of the kernel before it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "begin.h"
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

// What launching asks about the current device; asked once for each.
struct DeviceLimits {
  bool can_overlap = false;  // starts a kernel before the one ahead of it has ended
  bool has_wgmma = false;    // has a warpgroup's products, and this build their code

  static DeviceLimits current() {
    constexpr int kMaxDevices = 64;
    static std::array<std::atomic<int>, kMaxDevices> known{};  // major number; 0: not asked yet
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices) return {};
    int major = known[device].load(std::memory_order_relaxed);
    if (major == 0) {
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
      known[device].store(major, std::memory_order_relaxed);
    }
#ifdef ELASTIC_CACHE_SM90A  // the build has code for 9.0a
    return {major >= 9, major == 9};
#else
    return {major >= 9, false};
#endif
  }
};

struct SharedBytes {
  size_t count;
};

struct ClusterSize {
  unsigned int blocks = 1;
};

// A kernel that begins early must call wait_for_previous() before it touches memory that a kernel
// may write: an op's inputs may be what the kernel before it, whoever launched that, is writing.
// (Every block must wait: the kernel after this one relies on it for all kernels before.)
template <class... Args>
void launch(Begin begin, const char* op, void (*kernel)(Args...), dim3 grid, int num_threads,
            Stream stream, SharedBytes shared, ClusterSize cluster,
            const std::type_identity_t<Args>&... args) {
  std::array<cudaLaunchAttribute, 2> attributes{};
  unsigned int count = 0;
  if (begin == Begin::kEarly && DeviceLimits::current().can_overlap) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster.blocks > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {cluster.blocks, 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned int>(num_threads));
  config.dynamicSmemBytes = shared.count;
  config.stream = stream;
  config.attrs = attributes.data();
  config.numAttrs = count;
  allow_shared(kernel, static_cast<int64_t>(shared.count), op);
  cudaLaunchKernelEx(&config, kernel, args...);
  check_launch(op);
}

template <class... Args>
void launch_overlapping(const char* op, void (*kernel)(Args...), dim3 grid, int num_threads,
                        Stream stream, SharedBytes shared,
                        const std::type_identity_t<Args>&... args) {
  launch(Begin::kEarly, op, kernel, grid, num_threads, stream, shared, ClusterSize{}, args...);
}

template <class... Args>
void launch_overlapping(const char* op, void (*kernel)(Args...), dim3 grid, int num_threads,
                        Stream stream, const std::type_identity_t<Args>&... args) {
  launch_overlapping(op, kernel, grid, num_threads, stream, SharedBytes{0}, args...);
}

// Waits for the kernel before this one to end.
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// The next kernel may start when all blocks of this one have come here; else when they have ended.
// It pays where that one has something to do before it waits, which stream_linear.cuh alone has:
// elsewhere it made a step 1 to 2 % slower [measured].
__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

inline unsigned int blocks_for(int64_t items, int64_t per_block) {
  return static_cast<unsigned int>((items + per_block - 1) / per_block);
}

}  // namespace elastic_cache::cuda
