// See the header for the formula, cache_write_row.h for the copying and rotating.
#include "elastic_cache/cache_write.h"

#include "cache_write_row.h"
#include "common.h"

namespace elastic_cache {

void cache_write_cpu(const CacheWriteParams& params) {
  const auto width = static_cast<double>((params.num_heads + 2 * params.num_kv_heads) *
                                         params.head_dim);
  with_dtype(params.dtype, [&](auto zero) {
    parallel_for(params.num_rows, kCacheWriteNanoseconds * width,
                 [&](int64_t row) { cache_write_row<decltype(zero)>(params, row); });
  });
}

}  // namespace elastic_cache
