// See the header for the formula, linear_tile.h for the arithmetic.
#include "elastic_cache/linear.h"

#include "common.h"
#include "linear_tile.h"
#include "phases.h"

namespace elastic_cache {

void linear_cpu(const LinearParams& params) {
  with_dtype(params.dtype, [&](auto zero) {
    with_team(linear_nanoseconds(params),
              [&](const Team& team) { share_linear<decltype(zero)>(params, team); });
  });
}

}  // namespace elastic_cache
