// Params of the ops that also are parts of larger ops.
#pragma once

#include <initializer_list>

#include "checks.h"
#include "elastic_cache/add_rms_norm.h"
#include "elastic_cache/cache_write.h"
#include "elastic_cache/linear.h"

namespace elastic_cache::ops {

// x weight + bias -> out.
inline LinearParams linear_params(DType dtype, const Tensor& x, const Tensor& weight,
                                  const void* bias, const Tensor& out) {
  return {.dtype = dtype,
          .num_rows = out.size(0),
          .in_features = weight.size(0),
          .out_features = weight.size(1),
          .x_row_stride = x.stride(0),
          .weight_row_stride = weight.stride(0),
          .x = input<void>(x),
          .weight = input<void>(weight),
          .bias = bias,
          .out = output<void>(out)};
}

struct Product {
  const Tensor& x;
  const Tensor& weight;
  const Tensor& out;
};
// That rows of all these products can be independent of each other where the tensors are.
void check_batch_invariant(const Checks& check, std::initializer_list<Product> products);

// linear of a layer's weights, which may be read before earlier work in the stream has ended.
void layer_linear(DType dtype, const Tensor& x, const Tensor& weight,
                  const std::optional<Tensor>& bias, const Tensor& out, bool batch_invariant);

// layer_linear into gate_up and swiglu of that into out, or both in one without writing gate_up.
void layer_gated_linear(DType dtype, const Tensor& x, const Tensor& weight, const Tensor& gate_up,
                        const Tensor& out, bool batch_invariant);

// `rows` and `x_cache` are null without a layer-input cache.
inline AddRmsNormParams norm_params(DType dtype, const Tensor& residual, const void* delta,
                                    const Tensor& weight, double eps, const Tensor& out,
                                    const int32_t* rows = nullptr, void* x_cache = nullptr) {
  return {.dtype = dtype,
          .num_rows = residual.size(0),
          .width = residual.size(1),
          .eps = static_cast<float>(eps),
          .residual = output<void>(residual),
          .delta = delta,
          .weight = input<void>(weight),
          .rows = rows,
          .x_cache = x_cache,
          .out = output<void>(out)};
}

inline CacheWriteParams cache_write_params(
    DType dtype, const Tensor& qkv, const Tensor& rows, const Tensor& rope, int64_t capacity,
    const std::optional<Tensor>& segments, const Tensor& q_cache, const Tensor& k_cache,
    const Tensor& v_cache, const std::optional<Tensor>& q_old, const std::optional<Tensor>& k_old) {
  return {.dtype = dtype,
          .num_rows = rows.size(0),
          .num_heads = q_cache.size(1),
          .num_kv_heads = k_cache.size(1),
          .head_dim = q_cache.size(2),
          .capacity = capacity,
          .num_segments = segments ? segments->size(0) : 0,
          .qkv_row_stride = qkv.stride(0),
          .qkv = input<void>(qkv),
          .rows = input<int32_t>(rows),
          .rope = input<float>(rope),
          .segments = input<int32_t>(segments),
          .q_cache = output<void>(q_cache),
          .k_cache = output<void>(k_cache),
          .v_cache = output<void>(v_cache),
          .q_old = output<void>(q_old),
          .k_old = output<void>(k_old)};
}

}  // namespace elastic_cache::ops
