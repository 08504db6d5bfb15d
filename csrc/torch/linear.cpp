// linear: Tensor -> params -> kernel; on a GPU the vendor's product, through torch, or for the
// weights of a layer our own.
#include "elastic_cache/linear.h"

#include <torch/csrc/stable/ops.h>

#include <array>

#include "checks.h"
#include "launch.h"
#include "layer_params.h"
#include "ops.h"
#ifdef ELASTIC_CACHE_CUDA
#include "stream_linear.h"
#include "zero_bias.h"
#endif

namespace elastic_cache::ops {
namespace {

#ifdef ELASTIC_CACHE_CUDA
// For how many bfloat16 rows torch's product is faster with a bias than without: with one it asks
// cuBLASLt, without one cuBLAS, which chooses other kernels [measured on an H200, microseconds for
// the four products of a LLaDA-8B layer, with / without: 123.1 / 123.3 at 16 rows, 119.3 / 124.2 at
// 32, 120.4 / 125.2 at 64, 124.0 / 133.9 at 96, 135.1 / 130.5 at 128, 586 / 594 at 1024].
bool prefers_bias(int64_t num_rows) {
  return (num_rows > 16 && num_rows <= 112) || num_rows >= 512;
}

std::optional<Tensor> zeros_for(const Tensor& out) {
  if (!out.is_cuda() || !prefers_bias(out.size(0)) ||
      out.scalar_type() != torch::headeronly::ScalarType::BFloat16) {
    return std::nullopt;
  }
  const CurrentStream current(out);
  const std::array<int64_t, 1> size{out.size(1)}, stride{1};
  void* zeros = cuda::zero_bias(size[0] * static_cast<int64_t>(sizeof(uint16_t)));
  if (zeros == nullptr) return std::nullopt;
  return torch::stable::from_blob(zeros, size, stride, out.device(), out.scalar_type());
}
#else
std::optional<Tensor> zeros_for(const Tensor&) { return std::nullopt; }
#endif

// out = x W + bias by torch's own kernels.
void vendor_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   const Tensor& out) {
  using torch::stable::detail::from;
  const std::optional<Tensor> added = bias ? bias : zeros_for(out);
  // aten::linear takes [out, in] and transposes it itself.
  std::array<StableIValue, 4> stack{from(x), from(torch::stable::transpose(weight, 0, 1)),
                                    from(added), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // owns the returned handle
}

#ifdef ELASTIC_CACHE_CUDA
bool streams(const Tensor& weight, const Tensor& out, int64_t max_rows, bool batch_invariant) {
  return out.is_cuda() && weight.stride(1) == 1 && (batch_invariant || out.size(0) <= max_rows);
}

// Our own product, where it has a form for it, and one that is no slower than torch's if that does.
bool own_linear(DType dtype, const Tensor& x, const Tensor& weight,
                const std::optional<Tensor>& bias, const Tensor& out, cuda::Begin begin,
                bool batch_invariant) {
  if (!streams(weight, out, cuda::kStreamRows, batch_invariant)) return false;
  const CurrentStream stream(out);
  return cuda::stream_linear(linear_params(dtype, x, weight, input<void>(bias), out), begin,
                             stream);
}
#endif

}  // namespace

void linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
            const Tensor& out, bool batch_invariant) {
  const Checks check("linear", {{"x", x, Type::kModel, Memory::kRows},
                                {"weight", weight, Type::kModel, Memory::kMatrix},
                                {"bias", bias, Type::kModel},
                                {"out", out, Type::kModel}});
  check.shape("x", x, {{"rows"}, {"in_features"}});
  const int64_t num_rows = x.size(0), in_features = x.size(1);
  check.shape("weight", weight, {{"in_features", in_features}, {"out_features"}});
  const int64_t out_features = weight.size(1);
  check.shape("bias", bias, {{"out_features", out_features}});
  check.shape("out", out, {{"rows", num_rows}, {"out_features", out_features}});

  if (batch_invariant) check_batch_invariant(check, {{x, weight, out}});
  if (out.is_cpu()) {
    linear_cpu(linear_params(check.dtype(), x, weight, input<void>(bias), out));
    return;
  }
#ifdef ELASTIC_CACHE_CUDA
  const auto begin = cuda::Begin::kAfter;
  if (batch_invariant && own_linear(check.dtype(), x, weight, bias, out, begin, true)) return;
#endif
  vendor_linear(x, weight, bias, out);
}

void check_batch_invariant([[maybe_unused]] const Checks& check,
                           [[maybe_unused]] std::initializer_list<Product> products) {
#ifdef ELASTIC_CACHE_CUDA
  for (const Product& product : products) {
    const Tensor& weight = product.weight;
    if (product.out.is_cpu() || product.out.size(0) == 0) continue;
    const CurrentStream on_its_device(product.out);
    const LinearParams params =
        linear_params(check.dtype(), product.x, weight, nullptr, product.out);
    check.that(weight.stride(1) == 1 && cuda::can_stream(params),
               "batch_invariant must be false here: on a GPU rows are independent of each other "
               "in bfloat16 alone, on compute capability 9.0, with weights stored [in, out] whose "
               "sizes are multiples of 64, got [",
               weight.size(0), ", ", weight.size(1), "]");
  }
#endif
}

void layer_linear([[maybe_unused]] DType dtype, const Tensor& x, const Tensor& weight,
                  const std::optional<Tensor>& bias, const Tensor& out, bool batch_invariant) {
#ifdef ELASTIC_CACHE_CUDA
  const auto begin = cuda::Begin::kEarly;
  if (own_linear(dtype, x, weight, bias, out, begin, batch_invariant)) return;
#endif
  linear(x, weight, bias, out, batch_invariant);
}

void layer_gated_linear(DType dtype, const Tensor& x, const Tensor& weight, const Tensor& gate_up,
                        const Tensor& out, bool batch_invariant) {
#ifdef ELASTIC_CACHE_CUDA
  if (streams(weight, out, cuda::kGatedStreamRows, batch_invariant)) {
    const CurrentStream stream(out);
    const LinearParams params = linear_params(dtype, x, weight, nullptr, gate_up);
    if (cuda::stream_gated_linear(params, output<void>(out), stream)) return;
  }
#endif
  layer_linear(dtype, x, weight, std::nullopt, gate_up, batch_invariant);
  swiglu(gate_up, out);
}

}  // namespace elastic_cache::ops
