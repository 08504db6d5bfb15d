// Elements as float, one at a time or 16 bytes at a time. A vector access needs 16-byte alignment,
// which rows have when their width and the tensor's first element have it.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace elastic_cache::cuda {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}

// What a value becomes when it is stored as T and read back.
template <class T>
__device__ inline float round_to(float x) {
  return to_float(from_float<T>(x));
}

// 16 bytes of T.
template <class T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T data[kSize];
};

template <class T>
__device__ inline Vector<T> load_vector(const T* p) {
  return *reinterpret_cast<const Vector<T>*>(p);
}
template <class T>
__device__ inline void store_vector(T* p, const Vector<T>& x) {
  *reinterpret_cast<Vector<T>*>(p) = x;
}

// Whether rows of `width` elements from `p` on can be read as vectors.
template <class T>
inline bool is_vectorisable(const void* p, int64_t width) {
  return p == nullptr ||
         (reinterpret_cast<std::uintptr_t>(p) % 16 == 0 && width % Vector<T>::kSize == 0);
}

}  // namespace elastic_cache::cuda
