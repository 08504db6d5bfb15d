// Lists every position of the sequences that run in full mode at this layer.
#include "elastic_cache/refresh_rows.h"

#include <algorithm>

namespace elastic_cache {

bool refresh_rows_cpu(const RefreshRowsParams& params) {
  const RefreshRowsParams& p = params;
  int64_t count = 0;
  for (int64_t s = 0; s < p.num_sequences; ++s) {
    p.offsets[s] = static_cast<int32_t>(count);
    if (p.layer < p.first_full_layer[s]) continue;
    const int64_t begin = p.key_range[2 * s], end = p.key_range[2 * s + 1];
    if (count + std::max<int64_t>(end - begin, 0) > p.max_rows) return false;
    for (int64_t position = begin; position < end; ++position) {
      p.rows[count++] = static_cast<int32_t>(s * p.capacity + position);
    }
  }
  p.offsets[p.num_sequences] = static_cast<int32_t>(count);
  std::fill(p.rows + count, p.rows + p.max_rows, -1);
  return true;
}

}  // namespace elastic_cache
