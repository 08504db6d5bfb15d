// Elements as float, and packs of N elements that are loaded and stored by one access.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <initializer_list>
#include <type_traits>

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

inline constexpr float kLog2E = 1.44269504088896340736f;

// 2^x; results below 2^-126 become zero, which saves exp2f's three instructions for them.
__device__ inline float exp2_flush(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The most elements one thread can load at once: 16 bytes.
template <class T>
inline constexpr int kVectorSize = 16 / sizeof(T);

// Plain storage, so that a pack in shared memory or a register array needs no constructor.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T data[N];
};

template <class T, int N>
__device__ inline Pack<T, N> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}
template <class T, int N>
__device__ inline void store_pack(T* p, const Pack<T, N>& x) {
  *reinterpret_cast<Pack<T, N>*>(p) = x;
}

// A pack as it lies in memory: taken apart, its bfloat16 are twice as many registers. For packs
// that are kept for long.
template <class T, int N>
using RawPack = std::conditional_t<sizeof(Pack<T, N>) == 16, uint4, Pack<T, N>>;

template <class T, int N>
__device__ inline RawPack<T, N> load_raw(const T* p) {
  return *reinterpret_cast<const RawPack<T, N>*>(p);
}
template <class T, int N>
__device__ inline void store_raw(T* p, const RawPack<T, N>& x) {
  *reinterpret_cast<RawPack<T, N>*>(p) = x;
}
template <class T, int N>
__device__ inline float raw_element(const RawPack<T, N>& x, int n) {
  return to_float(reinterpret_cast<const Pack<T, N>&>(x).data[n]);
}

// Whether arrays (null ones aside) can be accessed kVectorSize<T> elements at a time, given the
// lengths and strides that must then be multiples of it.
template <class T>
inline bool are_vectors(std::initializer_list<const void*> arrays,
                        std::initializer_list<int64_t> lengths) {
  bool holds = true;
  for (const void* array : arrays) {
    holds = holds && reinterpret_cast<std::uintptr_t>(array) % 16 == 0;
  }
  for (const int64_t length : lengths) holds = holds && length % kVectorSize<T> == 0;
  return holds;
}

// f(N), N the elements a thread takes at once as a compile-time constant: 16 bytes of them where
// the arrays allow it, else one.
template <class T, class F>
inline void with_pack_size(bool has_vectors, const F& f) {
  if (has_vectors) {
    f(std::integral_constant<int, kVectorSize<T>>{});
  } else {
    f(std::integral_constant<int, 1>{});
  }
}

}  // namespace elastic_cache::cuda
