// Zeros on the current device, for a product that wants a bias: nothing is allocated or launched,
// so that it works inside a graph capture as well.
#pragma once

#include <cstdint>

namespace elastic_cache::cuda {

// `bytes` of zeros that nobody may write to; null when that is more than there are.
void* zero_bias(int64_t bytes);

}  // namespace elastic_cache::cuda
