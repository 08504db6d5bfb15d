// The one product under both attention operators, vectorised over LANES. A lane is one (row, query
// head) pair; lanes are the fastest axis of q^T [D, lanes], of the scores [keys, lanes] and of the
// outputs [D, lanes], so that softmax needs no horizontal step:
//   c[j][lane] = scale[lane] * c[j][lane] + sum_i a[i][lane] * b(i, j)
// Scores are a = q^T, b(i, j) = K[j][i]; outputs are a = p, b(i, j) = V[i][j].
// The subtle thing: a lane's result is one sequential sum whatever its neighbours, the tiling and
// the number of threads are. A row's output therefore does not depend on the batch it ran in.
#pragma once

#include "common.h"

namespace elastic_cache {

#ifdef __AVX512VL__
inline constexpr int kTileVectors = 6;  // 32 registers: 6 x 4 accumulators and 6 operands
#else
inline constexpr int kTileVectors = 3;
#endif

// Rows of lanes, `stride` floats apart.
struct LaneRows {
  float* data;
  int64_t stride;

  LaneRows from(int64_t vector) const { return {data + vector * kLanes, stride}; }
};

// Elements i, j of the operand without lanes are at data[i * step_i + j * step_j].
struct Operand {
  const float* data;
  int64_t step_i;
  int64_t step_j;
};

// NV vectors of lanes x NJ columns, held in registers. `scale` is null to overwrite c.
template <int NV, int NJ>
inline void product_tile(LaneRows a, const Operand& b, int64_t j, int64_t num_i,
                         const Float8* scale, LaneRows c) {
  Float8 acc[NJ][NV] = {};
  const float* column = b.data + j * b.step_j;
  for (int64_t i = 0; i < num_i; ++i, a.data += a.stride, column += b.step_i) {
    Float8 left[NV];
    for (int v = 0; v < NV; ++v) {
      Float8 loaded = load8(a.data + v * kLanes);  // an element in asm would live in memory
      keep_in_register(loaded);
      left[v] = loaded;
    }
    for (int t = 0; t < NJ; ++t) {
      Float8 right = splat(column[t * b.step_j]);
      keep_in_register(right);
      for (int v = 0; v < NV; ++v) acc[t][v] = multiply_add(left[v], right, acc[t][v]);
    }
  }
  for (int t = 0; t < NJ; ++t) {
    for (int v = 0; v < NV; ++v) {
      float* out = c.data + (j + t) * c.stride + v * kLanes;
      store8(out, scale ? multiply_add(load8(out), scale[v], acc[t][v]) : acc[t][v]);
    }
  }
}

// Columns a tile takes. At least 8 accumulators hide the latency of the multiply-add; with the
// vectors of lanes and a broadcast they must fit the registers. Measured best for each number.
template <int NV>
constexpr int tile_columns() {
  if (kTileVectors > 3) return NV <= 3 ? 8 : 4;
  return NV == 1 ? 8 : NV == 2 ? 6 : 3;
}

// `between(count)` runs after each tile of so many columns: the place for a few prefetches.
template <int NV, class Between>
void product_columns(const LaneRows& a, const Operand& b, int64_t num_i, int64_t num_j,
                     const Float8* scale, const LaneRows& c, const Between& between) {
  constexpr int kColumns = tile_columns<NV>();
  int64_t j = 0;
  for (; j + kColumns <= num_j; j += kColumns) {
    product_tile<NV, kColumns>(a, b, j, num_i, scale, c);
    between(kColumns);
  }
  for (; j + 2 <= num_j; j += 2) product_tile<NV, 2>(a, b, j, num_i, scale, c);
  for (; j < num_j; ++j) product_tile<NV, 1>(a, b, j, num_i, scale, c);
}

// Calls f with a compile-time number of vectors, 1 to 6.
template <class F>
inline void with_vectors(int64_t num_vectors, const F& f) {
  switch (num_vectors) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 5: return f(std::integral_constant<int, 5>{});
    case 6: return f(std::integral_constant<int, 6>{});
  }
}

// a [num_i, lanes], c [num_j, lanes], of which the first NV (1 to 6) vectors are computed.
template <int NV, class Between>
inline void lane_product(const LaneRows& a, const Operand& b, int64_t num_i, int64_t num_j,
                         const Float8* scale, const LaneRows& c, const Between& between) {
  if constexpr (NV <= kTileVectors) {
    product_columns<NV>(a, b, num_i, num_j, scale, c, between);
  } else {
    constexpr int kFirst = (NV + 1) / 2;
    lane_product<kFirst>(a, b, num_i, num_j, scale, c, between);
    lane_product<NV - kFirst>(a.from(kFirst), b, num_i, num_j, scale ? scale + kFirst : nullptr,
                              c.from(kFirst), [](int64_t) {});
  }
}

// One column of q^T [D, lanes]: a query times `factor`.
template <class T>
inline void pack_query(const T* query, float factor, int64_t head_dim, int64_t lanes, float* to) {
  for (int64_t d = 0; d < head_dim; ++d) to[d * lanes] = to_float(query[d]) * factor;
}

// n rows of head_dim elements as contiguous floats.
template <class T>
inline void copy_rows(const T* from, int64_t stride, int64_t n, int64_t head_dim, float* to) {
  for (int64_t i = 0; i < n; ++i, from += stride, to += head_dim) {
    int64_t d = 0;
    for (; d + kLanes <= head_dim; d += kLanes) store8(to + d, load8(from + d));
    for (; d < head_dim; ++d) to[d] = to_float(from[d]);
  }
}

// Rows of a cache as an operand b(i, j) = rows[j][i]: where they are, or from a converted copy.
inline Operand rows_operand(const float* rows, int64_t stride, int64_t, int64_t, float*) {
  return {rows, 1, stride};
}
inline Operand rows_operand(const BFloat16* rows, int64_t stride, int64_t n, int64_t head_dim,
                            float* copy) {
  copy_rows(rows, stride, n, head_dim, copy);
  return {copy, 1, head_dim};
}

}  // namespace elastic_cache
