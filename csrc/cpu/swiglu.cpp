// See the header for the formula, swiglu_row.h for the arithmetic.
#include "elastic_cache/swiglu.h"

#include "common.h"
#include "swiglu_row.h"

namespace elastic_cache {

void swiglu_cpu(const SwigluParams& params) {
  const int64_t width = params.width;
  with_dtype(params.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* gate_up = static_cast<const T*>(params.gate_up);
    T* out = static_cast<T*>(params.out);
    parallel_for(params.num_rows, kSwigluNanoseconds * static_cast<double>(width),
                 [&](int64_t row) {
                   const T* gate = gate_up + row * 2 * width;
                   swiglu_row(gate, gate + width, width, out + row * width);
                 });
  });
}

}  // namespace elastic_cache
