// x W + bias for a tile: a strip of up to 16 columns and up to kTileRows rows, sums in registers.
// A strip's weights come from memory once, prefetched while the strip before it is computed, and
// stay in the first two cache levels while the tiles pass over them.
// Why not the vendor's product: at 16 to 48 rows it reaches a third of what it does at 350.
// bfloat16 is widened, or, where the processor multiplies it (AVX512-BF16), taken as it is, two
// terms an instruction; that takes subnormal numbers as zeros.
#pragma once

#include <type_traits>
#include <utility>

#include "common.h"
#include "elastic_cache/linear.h"
#include "phases.h"

namespace elastic_cache {

inline constexpr double kLinearNanoseconds = 0.02;  // a multiply-add, of one core with AVX2
inline constexpr int64_t kStrip = 16;
// Terms summed in registers before they join the total: keeps rounding errors from growing with K.
// With 256, at K = 256, 6 of 120 draws erred more than twice as much as torch's product, with 128
// none of 240; a step takes as long.
inline constexpr int64_t kLinearBlock = 128;

// One row of a strip in registers. kTileRows: with AVX-512 15 of 32 registers hold sums, and 24
// are no faster; with AVX2 12 sums, two weights and a broadcast are 15 of 16.
#ifdef __AVX512F__
inline constexpr int kTileRows = 15;
struct StripVector {
  __m512 all = _mm512_setzero_ps();
};
inline StripVector load_strip(const float* p) { return {_mm512_loadu_ps(p)}; }
inline StripVector load_strip(const BFloat16* p) {
  using Ushort16 = uint16_t __attribute__((vector_size(32)));
  using Uint16 = uint32_t __attribute__((vector_size(64)));
  Ushort16 x;
  std::memcpy(&x, p, sizeof(x));
  return {bit_cast<__m512>(__builtin_convertvector(x, Uint16) << 16)};
}
inline void keep_in_register(StripVector& x) { asm("" : "+v"(x.all)); }
inline void add_product(const StripVector& weight, float x, StripVector& sum) {
  sum.all = _mm512_fmadd_ps(weight.all, _mm512_set1_ps(x), sum.all);
}
#ifdef __AVX512BF16__
// A row of a strip and the next one, their elements of a column side by side.
inline StripVector load_pairs(const BFloat16* p, int64_t stride) {
  alignas(64) static constexpr uint16_t kOrder[] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                    37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                    11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const auto twice = [](const BFloat16* row) {  // fills both halves of the register
    return _mm512_maskz_broadcast_i64x4(
        0xFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
  };
  const __m512i order = _mm512_load_si512(kOrder);
  return {bit_cast<__m512>(_mm512_permutex2var_epi16(twice(p), order, twice(p + stride)))};
}
// Adds the products with two neighbours of x.
inline void add_products(const StripVector& weights, const BFloat16* x, StripVector& sum) {
  int32_t pair;
  std::memcpy(&pair, x, sizeof(pair));
  sum.all = _mm512_dpbf16_ps(sum.all, bit_cast<__m512bh>(weights.all),
                             bit_cast<__m512bh>(_mm512_set1_epi32(pair)));
}
#endif
inline void add_to(float* total, const StripVector& sum) {
  _mm512_storeu_ps(total, _mm512_add_ps(_mm512_loadu_ps(total), sum.all));
}
#else
inline constexpr int kTileRows = 6;
struct StripVector {
  Float8 left = {}, right = {};
};
template <class T>
inline StripVector load_strip(const T* p) {
  return {load8(p), load8(p + kLanes)};
}
inline void keep_in_register(StripVector& x) {
  keep_in_register(x.left);
  keep_in_register(x.right);
}
inline void add_product(const StripVector& weight, float x, StripVector& sum) {
  const Float8 value = splat(x);
  sum.left = multiply_add(weight.left, value, sum.left);
  sum.right = multiply_add(weight.right, value, sum.right);
}
inline void add_to(float* total, const StripVector& sum) {
  store8(total, load8(total) + sum.left);
  store8(total + kLanes, load8(total + kLanes) + sum.right);
}
#endif

// Adds num_k terms of NR rows x 16 columns to total [NR, 16].
template <int NR, bool kPrefetchNext, class T>
void add_block(const T* x, int64_t x_stride, const T* weight, int64_t weight_stride, int64_t num_k,
               float* total) {
  StripVector sum[NR];
  int64_t k = 0;
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<T, BFloat16>) {
    for (; k + 2 <= num_k; k += 2, weight += 2 * weight_stride) {
      if constexpr (kPrefetchNext) {
        __builtin_prefetch(weight + kStrip);
        __builtin_prefetch(weight + weight_stride + kStrip);
      }
      StripVector w = load_pairs(weight, weight_stride);
      keep_in_register(w);
      for (int r = 0; r < NR; ++r) add_products(w, x + r * x_stride + k, sum[r]);
    }
  }
#endif
  for (; k < num_k; ++k, weight += weight_stride) {
    if constexpr (kPrefetchNext) __builtin_prefetch(weight + kStrip);
    StripVector w = load_strip(weight);
    keep_in_register(w);
    for (int r = 0; r < NR; ++r) add_product(w, to_float(x[r * x_stride + k]), sum[r]);
  }
  for (int r = 0; r < NR; ++r) add_to(total + r * kStrip, sum[r]);
}

// add_block for every number of rows: kEntries[NR - 1][whether to prefetch].
template <class T>
using AddBlock = void (*)(const T*, int64_t, const T*, int64_t, int64_t, float*);
template <class T, class Rows = std::make_integer_sequence<int, kTileRows>>
struct AddBlockTable;
template <class T, int... kRow>
struct AddBlockTable<T, std::integer_sequence<int, kRow...>> {
  static constexpr AddBlock<T> kEntries[][2] = {
      {add_block<kRow + 1, false, T>, add_block<kRow + 1, true, T>}...};
};

// A product's tiles in the order in which they are best computed: those of one strip follow each
// other. Shared out tile by tile, because a product may have fewer strips than there are threads,
// or a number that does not divide evenly.
class LinearTiles {
 public:
  LinearTiles(int64_t num_rows, int64_t num_columns)
      : num_rows_(num_rows),
        num_columns_(num_columns),
        tiles_per_strip_((num_rows + kTileRows - 1) / kTileRows) {}

  int64_t count() const { return (num_columns_ + kStrip - 1) / kStrip * tiles_per_strip_; }

  // Calls f(column, num_columns, row, num_rows, is_first) for the tiles begin .. end - 1;
  // is_first: the tile is the caller's first one of its strip.
  template <class F>
  void visit(int64_t begin, int64_t end, const F& f) const {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t column = tile / tiles_per_strip_ * kStrip, index = tile % tiles_per_strip_;
      // Tiles of nearly equal height: 16 rows are 8 and 8, not 15 and 1.
      const int64_t row = num_rows_ * index / tiles_per_strip_;
      const int64_t next_row = num_rows_ * (index + 1) / tiles_per_strip_;
      f(column, std::min(kStrip, num_columns_ - column), row, next_row - row,
        index == 0 || tile == begin);
    }
  }

 private:
  int64_t num_rows_, num_columns_, tiles_per_strip_;
};

// The first n <= 16 columns of num_k rows of a strip, and zeros beside them.
template <class T>
void pad_strip(const T* weight, int64_t weight_stride, int64_t num_k, int64_t n, T* padded) {
  std::fill(padded, padded + num_k * kStrip, T{});
  for (int64_t k = 0; k < num_k; ++k) {
    std::copy(weight + k * weight_stride, weight + k * weight_stride + n, padded + k * kStrip);
  }
}

// Columns `column` .. column + n - 1 (n <= 16) of rows `row` .. row + num_rows - 1 of p.out.
template <class T>
void linear_tile(const LinearParams& p, int64_t column, int64_t n, int64_t row, int64_t num_rows,
                 bool prefetches_next) {
  alignas(64) float total[kTileRows * kStrip] = {};
  alignas(64) T padded[kLinearBlock * kStrip];
  const T* x = static_cast<const T*>(p.x) + row * p.x_row_stride;
  const T* weight = static_cast<const T*>(p.weight) + column;
  const AddBlock<T> add = AddBlockTable<T>::kEntries[num_rows - 1][prefetches_next];
  for (int64_t k = 0; k < p.in_features; k += kLinearBlock) {
    const int64_t num_k = std::min(kLinearBlock, p.in_features - k);
    const T* block = weight + k * p.weight_row_stride;
    if (n == kStrip) {
      add(x + k, p.x_row_stride, block, p.weight_row_stride, num_k, total);
    } else {  // the last columns of a matrix that does not divide into strips
      pad_strip(block, p.weight_row_stride, num_k, n, padded);
      add(x + k, p.x_row_stride, padded, kStrip, num_k, total);
    }
  }
  const T* bias = p.bias ? static_cast<const T*>(p.bias) + column : nullptr;
  for (int64_t r = 0; r < num_rows; ++r) {
    T* out = static_cast<T*>(p.out) + (row + r) * p.out_features + column;
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

// This thread's part of a product.
template <class T>
void share_linear(const LinearParams& p, const Team& team) {
  const LinearTiles tiles(p.num_rows, p.out_features);
  team.share(tiles.count(), [&](int64_t begin, int64_t end) {
    tiles.visit(begin, end, [&](int64_t column, int64_t n, int64_t row, int64_t num_rows,
                                bool is_first) {
      linear_tile<T>(p, column, n, row, num_rows, is_first);
    });
  });
}

inline double linear_nanoseconds(const LinearParams& p) {
  return kLinearNanoseconds * static_cast<double>(p.num_rows * p.in_features) *
         static_cast<double>(round_up(p.out_features, kStrip));
}

}  // namespace elastic_cache
