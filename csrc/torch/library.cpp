// Every schema of torch.ops.elastic_cache, in one list. Shapes and dtypes: the op's header under
// include/elastic_cache/, its docstring in python/elastic_cache/ops.
// All ops write into tensors they are given and return nothing: nothing is allocated in a step,
// and a captured CUDA graph sees stable addresses.
#include "ops.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(elastic_cache, m) {
  m.def(
      "rolling_rows(Tensor masked, Tensor committed, Tensor window, Tensor num_rows, "
      "Tensor key_range, int ahead, int repeats, int reach, Tensor(a!) due, "
      "Tensor(b!) chosen) -> ()");
  m.def(
      "select_rows(Tensor masked, Tensor committed, Tensor tracked, Tensor window, "
      "Tensor lookahead, Tensor(a!) rows, Tensor(b!) segments, Tensor(c!) window_rows) -> ()");
  m.def(
      "refresh_rows(Tensor first_full_layer, Tensor key_range, int layer, int capacity, "
      "Tensor(a!) rows, Tensor(b!) offsets) -> ()");
  m.def(
      "cache_write(Tensor qkv, Tensor rows, Tensor rope, int capacity, Tensor? segments, "
      "Tensor(a!) q_cache, Tensor(b!) k_cache, Tensor(c!) v_cache, Tensor(d!)? q_old, Tensor(e!)? "
      "k_old) -> ()");
  m.def(
      "window_attention(Tensor q_cache, Tensor k_cache, Tensor v_cache, Tensor rows, "
      "Tensor? segments, Tensor key_range, float scale, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "drift_attention(Tensor q_cache, Tensor k_cache, Tensor v_cache, Tensor? q_old, "
      "Tensor? k_old, Tensor rows, Tensor segments, Tensor key_range, float scale, "
      "Tensor(a!) out, Tensor(b!) lse, Tensor(c!) mass, Tensor(d!) similarity) -> ()");
  m.def(
      "drift_statistics(Tensor q_cache, Tensor k_cache, Tensor? q_old, Tensor? k_old, Tensor? lse, "
      "Tensor rows, Tensor segments, Tensor key_range, float scale, Tensor(a!) mass, "
      "Tensor(b!) similarity) -> ()");
  m.def(
      "drift_decision(Tensor similarity, Tensor gamma, Tensor mass, Tensor masked, "
      "Tensor key_range, int layer, Tensor(a!) first_full_layer, Tensor(b!) tracked) -> ()");
  m.def(
      "add_rms_norm(Tensor(a!) residual, Tensor? delta, Tensor weight, float eps, "
      "Tensor(b!) out, Tensor? rows, Tensor(c!)? x_cache) -> ()");
  m.def(
      "linear(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out, bool batch_invariant) -> ()");
  m.def("swiglu(Tensor gate_up, Tensor(a!) out) -> ()");
  m.def(
      "project_qkv(Tensor(a!) residual, Tensor? delta, Tensor norm_weight, float eps, "
      "Tensor weight, Tensor? bias, Tensor rows, Tensor rope, int capacity, Tensor? segments, "
      "Tensor(b!)? x_cache, Tensor(c!) q_cache, Tensor(d!) k_cache, Tensor(e!) v_cache, "
      "Tensor(f!)? q_old, Tensor(g!)? k_old, Tensor(h!) hidden, Tensor(i!) qkv, "
      "bool batch_invariant) -> ()");
  m.def(
      "output_mlp(Tensor attention, Tensor out_weight, Tensor(a!) residual, Tensor norm_weight, "
      "float eps, Tensor gate_up_weight, Tensor down_weight, Tensor(b!) hidden, "
      "Tensor(c!) gate_up, Tensor(d!) activation, Tensor(e!) delta, bool batch_invariant) -> ()");
  m.def(
      "token_confidence(Tensor logits, Tensor? noise, Tensor(a!) token, "
      "Tensor(b!) confidence) -> ()");
  m.def(
      "commit(Tensor token, Tensor confidence, Tensor candidates, Tensor rule, Tensor amount, "
      "Tensor key_range, int eos_id, Tensor? first_full_layer, int num_layers, "
      "Tensor(a!) tokens, Tensor(b!) masked, Tensor(c!) committed, Tensor(d!) eos_position, "
      "Tensor(e!) status) -> ()");
}

// One function an op: it launches the kernel of the device its tensors are on.
template <class Library>
static void implement(Library& m) {
  namespace ops = elastic_cache::ops;
  m.impl("rolling_rows", TORCH_BOX(&ops::rolling_rows));
  m.impl("select_rows", TORCH_BOX(&ops::select_rows));
  m.impl("refresh_rows", TORCH_BOX(&ops::refresh_rows));
  m.impl("cache_write", TORCH_BOX(&ops::cache_write));
  m.impl("window_attention", TORCH_BOX(&ops::window_attention));
  m.impl("drift_attention", TORCH_BOX(&ops::drift_attention));
  m.impl("drift_statistics", TORCH_BOX(&ops::drift_statistics));
  m.impl("drift_decision", TORCH_BOX(&ops::drift_decision));
  m.impl("add_rms_norm", TORCH_BOX(&ops::add_rms_norm));
  m.impl("linear", TORCH_BOX(&ops::linear));
  m.impl("swiglu", TORCH_BOX(&ops::swiglu));
  m.impl("project_qkv", TORCH_BOX(&ops::project_qkv));
  m.impl("output_mlp", TORCH_BOX(&ops::output_mlp));
  m.impl("token_confidence", TORCH_BOX(&ops::token_confidence));
  m.impl("commit", TORCH_BOX(&ops::commit));
}

STABLE_TORCH_LIBRARY_IMPL(elastic_cache, CPU, m) { implement(m); }

#ifdef ELASTIC_CACHE_CUDA
STABLE_TORCH_LIBRARY_IMPL(elastic_cache, CUDA, m) { implement(m); }
#endif
