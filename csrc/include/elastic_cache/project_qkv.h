// From the residual to q, k, v in the cache, for the rows of a layer: add_rms_norm, linear and
// cache_write as one op, with the same bits. A layer recomputes this for a few rows, or for all.
// The subtle thing is what connects the three: linear.x is norm.out, write.qkv is linear.out, and
// all have the same rows; norm.rows and write.rows are the same list. The bits are those of the
// CPU; on a GPU the op may use another product than linear, and read the weights before earlier
// work in the stream has ended: no kernel of this library that is still pending may write them.
#pragma once

#include "elastic_cache/add_rms_norm.h"
#include "elastic_cache/cache_write.h"
#include "elastic_cache/linear.h"
#include "elastic_cache/types.h"

namespace elastic_cache {

struct ProjectQkvParams {
  AddRmsNormParams norm;
  LinearParams linear;
  CacheWriteParams write;
};

void project_qkv_cpu(const ProjectQkvParams& params);

}  // namespace elastic_cache
