// A task is a strip of 16 columns and all rows. The strip's weights come from memory once and stay
// in the first-level cache while the rows pass over them, six at a time: 6 x 2 vectors of sums, two
// of weights and a broadcast are 15 of AVX2's 16 registers.
// Why not the vendor's product: at 16 to 48 rows it reaches a third of what it does at 350.
#include "elastic_cache/linear.h"

#include "common.h"

namespace elastic_cache {
namespace {

constexpr int kMaxRows = 6;
constexpr int64_t kStrip = 2 * kLanes;
// Terms summed in registers before they join the total: keeps a block of the strip (16 KB) in the
// first-level cache, and rounding errors from growing with K.
constexpr int64_t kLinearBlock = 256;

// Sums of NR rows x 16 columns over one block of K, added to total [NR, 16].
template <int NR, class T>
inline void add_block(const T* x, int64_t x_stride, const T* weight, int64_t weight_stride,
                      int64_t num_k, float* total) {
  Float8 sum[NR][2] = {};
  for (int64_t k = 0; k < num_k; ++k, weight += weight_stride) {
    Float8 left = load8(weight), right = load8(weight + kLanes);
    keep_in_register(left);
    keep_in_register(right);
    for (int r = 0; r < NR; ++r) {
      const Float8 value = splat(to_float(x[r * x_stride + k]));
      sum[r][0] = multiply_add(left, value, sum[r][0]);
      sum[r][1] = multiply_add(right, value, sum[r][1]);
    }
  }
  for (int r = 0; r < NR; ++r) {
    store8(total + r * kStrip, load8(total + r * kStrip) + sum[r][0]);
    store8(total + r * kStrip + kLanes, load8(total + r * kStrip + kLanes) + sum[r][1]);
  }
}

template <class T>
void add_rows(int64_t num_rows, const T* x, int64_t x_stride, const T* weight,
              int64_t weight_stride, int64_t num_k, float* total) {
  int64_t r = 0;
  for (; r + kMaxRows <= num_rows; r += kMaxRows) {
    add_block<kMaxRows>(x + r * x_stride, x_stride, weight, weight_stride, num_k,
                        total + r * kStrip);
  }
  x += r * x_stride;
  total += r * kStrip;
  switch (num_rows - r) {
    case 5: add_block<5>(x, x_stride, weight, weight_stride, num_k, total); break;
    case 4: add_block<4>(x, x_stride, weight, weight_stride, num_k, total); break;
    case 3: add_block<3>(x, x_stride, weight, weight_stride, num_k, total); break;
    case 2: add_block<2>(x, x_stride, weight, weight_stride, num_k, total); break;
    case 1: add_block<1>(x, x_stride, weight, weight_stride, num_k, total); break;
    default: break;
  }
}

// Columns begin .. begin + n - 1, n <= 16. `total` is [R, 16], `padded` [kLinearBlock, 16].
template <class T>
void run_strip(const LinearParams& p, int64_t begin, int64_t n, float* total, T* padded) {
  const T* x = static_cast<const T*>(p.x);
  const T* weight = static_cast<const T*>(p.weight) + begin;
  const T* bias = p.bias ? static_cast<const T*>(p.bias) + begin : nullptr;
  std::fill(total, total + p.num_rows * kStrip, 0.0f);
  for (int64_t k = 0; k < p.in_features; k += kLinearBlock) {
    const int64_t num_k = std::min(kLinearBlock, p.in_features - k);
    const T* block = weight + k * p.weight_row_stride;
    int64_t stride = p.weight_row_stride;
    if (n < kStrip) {  // the last columns of a matrix that does not divide into strips
      std::fill(padded, padded + num_k * kStrip, T{});
      for (int64_t i = 0; i < num_k; ++i) {
        std::copy(block + i * stride, block + i * stride + n, padded + i * kStrip);
      }
      block = padded;
      stride = kStrip;
    }
    add_rows(p.num_rows, x + k, p.x_row_stride, block, stride, num_k, total);
  }
  for (int64_t r = 0; r < p.num_rows; ++r) {
    T* out = static_cast<T*>(p.out) + r * p.out_features + begin;
    const float* from = total + r * kStrip;
    if (n == kStrip && !bias) {
      store8(out, load8(from));
      store8(out + kLanes, load8(from + kLanes));
      continue;
    }
    for (int64_t i = 0; i < n; ++i) {
      out[i] = from_float<T>(from[i] + (bias ? to_float(bias[i]) : 0.0f));
    }
  }
}

}  // namespace

void linear_cpu(const LinearParams& params) {
  constexpr double kNanosecondsPerMultiplyAdd = 0.02;  // of one core with AVX2
  const int64_t num_strips = (params.out_features + kStrip - 1) / kStrip;
  const int64_t total = params.num_rows * kStrip, size = total + kLinearBlock * kStrip;
  const Scratch scratch(size * max_threads());
  with_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    parallel_for(num_strips,
                 kNanosecondsPerMultiplyAdd *
                     static_cast<double>(kStrip * params.num_rows * params.in_features),
                 [&](int64_t strip) {
                   float* own = scratch.data() + thread_index() * size;
                   const int64_t begin = strip * kStrip;
                   run_strip<T>(params, begin, std::min(kStrip, params.out_features - begin), own,
                                reinterpret_cast<T*>(own + total));
                 });
  });
}

}  // namespace elastic_cache
