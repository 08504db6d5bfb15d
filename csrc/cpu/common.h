// What every CPU operator needs besides arithmetic: dispatch on the dtype, the decision whether to
// go parallel, and scratch memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "elastic_cache/types.h"
#include "simd.h"

namespace elastic_cache {

// Calls f with a value of the C++ type that stores `dtype`.
template <class F>
void with_dtype(DType dtype, const F& f) {
  if (dtype == DType::kBFloat16) {
    f(BFloat16{});
  } else {
    f(float{});
  }
}

inline int max_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// Of the calling thread in the innermost parallel region.
inline int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Whether work that takes one core about `nanoseconds` should be shared. Entering and leaving a
// parallel region costs 2 to 5 us on the 2-core machines this was measured on, so two threads
// break even at about 8 us.
inline bool is_worth_sharing(double nanoseconds) {
  return nanoseconds > 8000.0 && max_threads() > 1;
}

// f(i) for i in [0, n), each taking one core about `nanoseconds_each`.
template <class F>
void parallel_for(int64_t n, double nanoseconds_each, const F& f) {
  if (n > 1 && is_worth_sharing(static_cast<double>(n) * nanoseconds_each)) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; ++i) f(i);
  } else {
    for (int64_t i = 0; i < n; ++i) f(i);
  }
}

inline constexpr int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// Uninitialised floats on a cache line boundary.
class Scratch {
 public:
  explicit Scratch(int64_t size)
      : data_(static_cast<float*>(
            ::operator new(static_cast<size_t>(size) * sizeof(float), kLine))) {}
  float* data() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(float* p) const { ::operator delete(p, kLine); }
  };
  std::unique_ptr<float, Free> data_;
};

}  // namespace elastic_cache
