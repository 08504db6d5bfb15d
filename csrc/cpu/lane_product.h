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

// Elements i, j of the operand without lanes are at data[i * step_i + j * step_j].
struct Operand {
  const float* data;
  int64_t step_i;
  int64_t step_j;
};

// NV vectors of lanes x NJ columns, held in registers. `scale` is null to overwrite c.
template <int NV, int NJ>
inline void product_tile(const float* a, int64_t lanes, const Operand& b, int64_t j, int64_t num_i,
                         const Float8* scale, float* c) {
  Float8 acc[NJ][NV] = {};
  const float* column = b.data + j * b.step_j;
  for (int64_t i = 0; i < num_i; ++i, a += lanes, column += b.step_i) {
    Float8 left[NV];
    for (int v = 0; v < NV; ++v) {
      left[v] = load8(a + v * kLanes);
      keep_in_register(left[v]);
    }
    for (int t = 0; t < NJ; ++t) {
      const Float8 right = splat(column[t * b.step_j]);
      for (int v = 0; v < NV; ++v) acc[t][v] = multiply_add(left[v], right, acc[t][v]);
    }
  }
  for (int t = 0; t < NJ; ++t) {
    for (int v = 0; v < NV; ++v) {
      float* out = c + (j + t) * lanes + v * kLanes;
      store8(out, scale ? multiply_add(load8(out), scale[v], acc[t][v]) : acc[t][v]);
    }
  }
}

template <int NV>
void product_columns(const float* a, int64_t lanes, const Operand& b, int64_t num_i, int64_t num_j,
                     const Float8* scale, float* c) {
  // At least 8 accumulators hide the latency of the multiply-add; with the vectors of lanes and a
  // broadcast they must fit the 16 registers of AVX2. Measured best for each number of vectors.
  constexpr int kColumns = NV == 1 ? 8 : NV == 2 ? 6 : 3;
  int64_t j = 0;
  for (; j + kColumns <= num_j; j += kColumns) {
    product_tile<NV, kColumns>(a, lanes, b, j, num_i, scale, c);
  }
  for (; j + 2 <= num_j; j += 2) product_tile<NV, 2>(a, lanes, b, j, num_i, scale, c);
  for (; j < num_j; ++j) product_tile<NV, 1>(a, lanes, b, j, num_i, scale, c);
}

// a [num_i, lanes], c [num_j, lanes]; lanes is a multiple of 8, of which `num_vectors` from a and c
// on are computed.
inline void lane_product(const float* a, int64_t lanes, int64_t num_vectors, const Operand& b,
                         int64_t num_i, int64_t num_j, const Float8* scale, float* c) {
  for (int64_t v = 0; v < num_vectors;) {
    const int64_t left = num_vectors - v;
    const Float8* s = scale ? scale + v : nullptr;
    const float* from = a + v * kLanes;
    float* to = c + v * kLanes;
    if (left >= 3 && left != 4) {
      product_columns<3>(from, lanes, b, num_i, num_j, s, to);
      v += 3;
    } else if (left >= 2) {
      product_columns<2>(from, lanes, b, num_i, num_j, s, to);
      v += 2;
    } else {
      product_columns<1>(from, lanes, b, num_i, num_j, s, to);
      v += 1;
    }
  }
}

// One column of q^T [D, lanes]: a query times `factor`.
template <class T>
inline void pack_query(const T* query, float factor, int64_t head_dim, int64_t lanes, float* to) {
  for (int64_t d = 0; d < head_dim; ++d) to[d * lanes] = to_float(query[d]) * factor;
}

// Asks for rows that will be needed soon. A head's part of a cache row is one or two cache lines,
// a whole row apart from the next, which hardware prefetchers do not follow well. Measured on
// Zen 3, one thread, 22 rows, 350 keys, D 32: attention over 32 layers in turn takes 149 us a layer
// instead of 174; over one layer again and again, in the second level already, it loses 10 us.
template <class T>
inline void prefetch_rows(const T* rows, int64_t stride, int64_t n, int64_t head_dim) {
  constexpr int64_t kLineElements = 64 / sizeof(T);
  for (int64_t i = 0; i < n; ++i, rows += stride) {
    for (int64_t d = 0; d < head_dim; d += kLineElements) __builtin_prefetch(rows + d, 0, 2);
  }
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
