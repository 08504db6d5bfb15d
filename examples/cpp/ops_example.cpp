// The ops from C++ through torch's dispatcher. Linking elastic_cache::ops is enough to register
// them; there is no header of theirs to include, a schema is found by its name.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cmath>
#include <iostream>
#include <optional>

int main() {
  const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("elastic_cache::window_attention", "")
          .typed<void(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                      const std::optional<at::Tensor>&, const at::Tensor&, double,
                      const at::Tensor&, const at::Tensor&)>();
  std::cout << op.schema() << "\n";

  const int64_t capacity = 256, heads = 4, head_dim = 32, num_rows = 8;
  const double scale = 1.0 / std::sqrt(static_cast<double>(head_dim));
  const at::Tensor q = at::randn({capacity, heads, head_dim});
  const at::Tensor k = at::randn_like(q), v = at::randn_like(q);
  const at::Tensor rows = at::arange(40, 40 + num_rows, at::kInt);
  const at::Tensor key_range = at::tensor({0, static_cast<int>(capacity)}, at::kInt).view({1, 2});
  const at::Tensor out = at::empty({num_rows, heads, head_dim});
  const at::Tensor lse = at::empty({num_rows, heads});

  op.call(q, k, v, rows, std::nullopt, key_range, scale, out, lse);

  const at::Tensor scores =
      at::einsum("rhd,khd->hrk", {q.index_select(0, rows), k}).to(at::kDouble) * scale;
  const at::Tensor expected =
      at::einsum("hrk,khd->rhd", {at::softmax(scores, -1), v.to(at::kDouble)});
  const double error = (expected - out).abs().max().item<double>();
  const double lse_error = (at::logsumexp(scores, {-1}).t() - lse).abs().max().item<double>();
  std::cout << "error of the output " << error << ", of the log-sum-exp " << lse_error << "\n";
  return error < 1e-5 && lse_error < 1e-5 ? 0 : 1;
}
