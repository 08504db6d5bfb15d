// See the header for the formula, add_rms_norm_row.h for the arithmetic.
#include "elastic_cache/add_rms_norm.h"

#include "add_rms_norm_row.h"
#include "common.h"

namespace elastic_cache {

void add_rms_norm_cpu(const AddRmsNormParams& params) {
  with_dtype(params.dtype, [&](auto zero) {
    parallel_for(params.num_rows, kNormNanoseconds * static_cast<double>(params.width),
                 [&](int64_t row) { add_rms_norm_row<decltype(zero)>(params, row); });
  });
}

}  // namespace elastic_cache
