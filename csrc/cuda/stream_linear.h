// The product of a layer's weights with the few rows of a step, on compute capability 9.0.
#pragma once

#include "elastic_cache/linear.h"

namespace elastic_cache::cuda {

// Computes linear(params), or returns false where it has no form for them.
// The subtle thing: it reads `weight` before earlier work in the stream has ended. No kernel of
// this library that is still pending may write it.
bool stream_linear(const LinearParams& params, Stream stream);

// The same of linear(gate_up) and swiglu after it, -> `out` [R, N / 2]; gate_up.out is not written.
bool stream_gated_linear(const LinearParams& gate_up, void* out, Stream stream);

}  // namespace elastic_cache::cuda
