// The ops as functions of tensors: check the arguments, fill the params struct, call the kernel.
// Shapes and dtypes: the op's header under include/elastic_cache/.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace elastic_cache::ops {

using torch::stable::Tensor;

void rolling_rows(const Tensor& masked, const Tensor& committed, const Tensor& window,
                  const Tensor& num_rows, const Tensor& key_range, int64_t ahead, int64_t repeats,
                  int64_t reach, const Tensor& due, const Tensor& chosen);
void select_rows(const Tensor& masked, const Tensor& committed, const Tensor& tracked,
                 const Tensor& window, const Tensor& lookahead, const Tensor& rows,
                 const Tensor& segments, const Tensor& window_rows);

void refresh_rows(const Tensor& first_full_layer, const Tensor& key_range, int64_t layer,
                  int64_t capacity, const Tensor& rows, const Tensor& offsets);

void cache_write(const Tensor& qkv, const Tensor& rows, const Tensor& rope, int64_t capacity,
                 const std::optional<Tensor>& segments, const Tensor& q_cache,
                 const Tensor& k_cache, const Tensor& v_cache, const std::optional<Tensor>& q_old,
                 const std::optional<Tensor>& k_old);

void window_attention(const Tensor& q_cache, const Tensor& k_cache, const Tensor& v_cache,
                      const Tensor& rows, const std::optional<Tensor>& segments,
                      const Tensor& key_range, double scale, const Tensor& out, const Tensor& lse);

void drift_attention(const Tensor& q_cache, const Tensor& k_cache, const Tensor& v_cache,
                     const std::optional<Tensor>& q_old, const std::optional<Tensor>& k_old,
                     const Tensor& rows, const Tensor& segments, const Tensor& key_range,
                     double scale, const Tensor& out, const Tensor& lse, const Tensor& mass,
                     const Tensor& similarity);

void drift_statistics(const Tensor& q_cache, const Tensor& k_cache,
                      const std::optional<Tensor>& q_old, const std::optional<Tensor>& k_old,
                      const std::optional<Tensor>& lse, const Tensor& rows, const Tensor& segments,
                      const Tensor& key_range, double scale, const Tensor& mass,
                      const Tensor& similarity);

void drift_decision(const Tensor& similarity, const Tensor& gamma, const Tensor& mass,
                    const Tensor& masked, const Tensor& key_range, int64_t layer,
                    const Tensor& first_full_layer, const Tensor& tracked);

void add_rms_norm(const Tensor& residual, const std::optional<Tensor>& delta, const Tensor& weight,
                  double eps, const Tensor& out, const std::optional<Tensor>& rows,
                  const std::optional<Tensor>& x_cache);

void linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
            const Tensor& out, bool batch_invariant);

void swiglu(const Tensor& gate_up, const Tensor& out);

void project_qkv(const Tensor& residual, const std::optional<Tensor>& delta,
                 const Tensor& norm_weight, double eps, const Tensor& weight,
                 const std::optional<Tensor>& bias, const Tensor& rows, const Tensor& rope,
                 int64_t capacity, const std::optional<Tensor>& segments,
                 const std::optional<Tensor>& x_cache, const Tensor& q_cache, const Tensor& k_cache,
                 const Tensor& v_cache, const std::optional<Tensor>& q_old,
                 const std::optional<Tensor>& k_old, const Tensor& hidden, const Tensor& qkv,
                 bool batch_invariant);

void output_mlp(const Tensor& attention, const Tensor& out_weight, const Tensor& residual,
                const Tensor& norm_weight, double eps, const Tensor& gate_up_weight,
                const Tensor& down_weight, const Tensor& hidden, const Tensor& gate_up,
                const Tensor& activation, const Tensor& delta, bool batch_invariant);

void token_confidence(const Tensor& logits, const std::optional<Tensor>& noise, const Tensor& token,
                      const Tensor& confidence);

void commit(const Tensor& token, const Tensor& confidence, const Tensor& candidates,
            const Tensor& rule, const Tensor& amount, const Tensor& key_range, int64_t eos_id,
            const std::optional<Tensor>& first_full_layer, int64_t num_layers, const Tensor& tokens,
            const Tensor& masked, const Tensor& committed, const Tensor& eos_position,
            const Tensor& status);

}  // namespace elastic_cache::ops
