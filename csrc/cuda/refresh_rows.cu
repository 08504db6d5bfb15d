// One block lists the sequences in turn; a sequence is refreshed whole or not at all, so places in
// the list are sums of range lengths and every thread knows them without a scan.
#include "elastic_cache/refresh_rows.h"

#include "common/launch.h"

namespace elastic_cache {
namespace {

constexpr int kThreads = 1024;

__global__ void __launch_bounds__(kThreads) refresh_rows_kernel(RefreshRowsParams p) {
  int64_t count = 0;
  for (int64_t s = 0; s < p.num_sequences; ++s) {
    if (threadIdx.x == 0) p.offsets[s] = static_cast<int32_t>(count);
    if (p.layer < p.first_full_layer[s]) continue;
    const int64_t first = p.key_range[2 * s], end = p.key_range[2 * s + 1];
    const int64_t length = end > first ? end - first : 0;
    for (int64_t i = threadIdx.x; i < length; i += kThreads) {
      if (count + i < p.max_rows) {
        p.rows[count + i] = static_cast<int32_t>(s * p.capacity + first + i);
      }
    }
    count += length;
  }
  if (threadIdx.x == 0) p.offsets[p.num_sequences] = static_cast<int32_t>(count);
  for (int64_t i = count + threadIdx.x; i < p.max_rows; i += kThreads) p.rows[i] = -1;
}

}  // namespace

void refresh_rows_cuda(const RefreshRowsParams& params, Stream stream) {
  refresh_rows_kernel<<<1, kThreads, 0, stream>>>(params);
  cuda::check_launch("refresh_rows");
}

}  // namespace elastic_cache
