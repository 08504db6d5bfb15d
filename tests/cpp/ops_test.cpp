// The dispatcher's view of elastic_cache::ops: linking registers every op with a CPU kernel, a
// call computes, and a wrong argument arrives as an exception with the op's sentence.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <iostream>
#include <string>

namespace {

constexpr const char* kOps[] = {
    "select_rows",      "refresh_rows",   "cache_write",  "window_attention", "drift_attention",
    "drift_statistics", "drift_decision", "add_rms_norm", "swiglu",           "token_confidence",
    "commit",           "project_qkv",    "output_mlp",
};

using Swiglu = void(const at::Tensor&, const at::Tensor&);

bool fail(const std::string& sentence) {
  std::cout << sentence << "\n";
  return false;
}

bool is_registered() {
  for (const char* name : kOps) {
    const auto op =
        c10::Dispatcher::singleton().findSchema({std::string("elastic_cache::") + name, ""});
    if (!op) return fail(std::string(name) + " has no schema");
    if (!op->hasKernelForDispatchKey(c10::DispatchKey::CPU)) {
      return fail(std::string(name) + " has no CPU kernel");
    }
  }
  return true;
}

bool computes(const c10::TypedOperatorHandle<Swiglu>& swiglu) {
  // silu(0) * up = 0, whatever was in the output.
  const at::Tensor gate_up = at::full({3, 4}, 0.0), out = at::full({3, 2}, 5.0);
  swiglu.call(gate_up, out);
  const float* values = out.const_data_ptr<float>();
  for (int i = 0; i < 6; ++i) {
    if (values[i] != 0.0f) return fail("swiglu of zeros is not zero");
  }
  return true;
}

bool explains(const c10::TypedOperatorHandle<Swiglu>& swiglu) {
  const std::string expected = "swiglu: gate_up must be [rows, 2 * width] = [3, 4], got [3, 5]";
  try {
    swiglu.call(at::empty({3, 5}), at::empty({3, 2}));
  } catch (const std::exception& error) {
    if (std::string(error.what()) == expected) return true;
    return fail(std::string("expected: ") + expected + "\ngot:      " + error.what());
  }
  return fail("swiglu took a gate_up of the wrong shape");
}

}  // namespace

int main() {
  if (!is_registered()) return 1;
  const auto swiglu =
      c10::Dispatcher::singleton().findSchemaOrThrow("elastic_cache::swiglu", "").typed<Swiglu>();
  return computes(swiglu) && explains(swiglu) ? 0 : 1;
}
