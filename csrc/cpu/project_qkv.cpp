// Three phases in one parallel region: rows are shared out, then tiles of the product, then rows.
#include "elastic_cache/project_qkv.h"

#include "add_rms_norm_row.h"
#include "cache_write_row.h"
#include "common.h"
#include "linear_tile.h"
#include "phases.h"

namespace elastic_cache {
namespace {

template <class T>
void run(const ProjectQkvParams& p, const Team& team) {
  team.share(p.norm.num_rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) add_rms_norm_row<T>(p.norm, row);
  });
  team.wait();
  share_linear<T>(p.linear, team);
  team.wait();
  team.share(p.write.num_rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) cache_write_row<T>(p.write, row);
  });
}

}  // namespace

void project_qkv_cpu(const ProjectQkvParams& params) {
  with_dtype(params.norm.dtype, [&](auto zero) {
    with_team(linear_nanoseconds(params.linear),
              [&](const Team& team) { run<decltype(zero)>(params, team); });
  });
}

}  // namespace elastic_cache
