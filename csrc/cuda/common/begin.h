// When a kernel may start.
#pragma once

namespace elastic_cache::cuda {

// While the kernel before it is still running, or when that has ended.
enum class Begin { kEarly, kAfter };

}  // namespace elastic_cache::cuda
