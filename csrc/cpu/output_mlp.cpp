// Four phases in one parallel region. The third computes a tile of the gate and the tile of `up`
// that belongs to it, and multiplies them while both are in the first-level cache.
#include "elastic_cache/output_mlp.h"

#include "add_rms_norm_row.h"
#include "common.h"
#include "linear_tile.h"
#include "phases.h"
#include "swiglu_row.h"

namespace elastic_cache {
namespace {

template <class T>
void share_activation(const LinearParams& gate_up, const SwigluParams& swiglu, const Team& team) {
  const int64_t width = swiglu.width;
  const LinearTiles tiles(swiglu.num_rows, width);
  team.share(tiles.count(), [&](int64_t begin, int64_t end) {
    tiles.visit(begin, end, [&](int64_t column, int64_t n, int64_t row, int64_t num_rows,
                                bool is_first) {
      linear_tile<T>(gate_up, column, n, row, num_rows, is_first);
      linear_tile<T>(gate_up, width + column, n, row, num_rows, is_first);
      for (int64_t r = row; r < row + num_rows; ++r) {
        const T* gate = static_cast<const T*>(swiglu.gate_up) + r * 2 * width + column;
        swiglu_row(gate, gate + width, n, static_cast<T*>(swiglu.out) + r * width + column);
      }
    });
  });
}

template <class T>
void run(const OutputMlpParams& p, const Team& team) {
  share_linear<T>(p.output, team);
  team.wait();
  team.share(p.norm.num_rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) add_rms_norm_row<T>(p.norm, row);
  });
  team.wait();
  share_activation<T>(p.gate_up, p.swiglu, team);
  team.wait();
  share_linear<T>(p.down, team);
}

}  // namespace

void output_mlp_cpu(const OutputMlpParams& params) {
  const double nanoseconds = linear_nanoseconds(params.output) +
                             linear_nanoseconds(params.gate_up) + linear_nanoseconds(params.down);
  with_dtype(params.norm.dtype, [&](auto zero) {
    with_team(nanoseconds, [&](const Team& team) { run<decltype(zero)>(params, team); });
  });
}

}  // namespace elastic_cache
