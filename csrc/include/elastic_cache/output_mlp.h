// From attention to the end of a layer: the output projection and the feed-forward block as one op,
// with the bits of linear, add_rms_norm, linear, swiglu and linear called one after the other.
//   delta = attention Wo;  residual += delta;  hidden = norm(residual)
//   gate_up = hidden Wgu;  activation = silu(gate) * up;  delta = activation Wdown
// The subtle thing is what connects the five: norm.delta is output.out, gate_up.x is norm.out,
// swiglu.gate_up is gate_up.out and down.x is swiglu.out; down.out is output.out again, which
// nothing reads any more by then. gate_up.out is scratch: a GPU may do without it. On a GPU: as in
// project_qkv.h.
#pragma once

#include "elastic_cache/add_rms_norm.h"
#include "elastic_cache/linear.h"
#include "elastic_cache/swiglu.h"
#include "elastic_cache/types.h"

namespace elastic_cache {

struct OutputMlpParams {
  LinearParams output;
  AddRmsNormParams norm;
  LinearParams gate_up;
  SwigluParams swiglu;
  LinearParams down;
};

void output_mlp_cpu(const OutputMlpParams& params);

}  // namespace elastic_cache
