"""The operators in plain torch: the executable specification, read next to the op headers.

Same names, argument order and in-place outputs as `elastic_cache.ops`, and nothing is returned.
Vocabulary (S sequences, C slots of each, R rows, H heads, ...): csrc/include/elastic_cache/types.h.

The subtle thing is precision. Tensors the ops take as float32 or bfloat16 may also be float64 here,
and so may every output that is not exact. Inner arithmetic is float32, or float64 for float64
tensors, and results are rounded where the headers say so: running the same inputs through float64
therefore gives the value that an operator is measured against.
"""

from elastic_cache.reference.layers import (
    add_rms_norm,
    cache_write,
    drift_attention,
    drift_decision,
    drift_statistics,
    linear,
    output_mlp,
    project_qkv,
    swiglu,
    window_attention,
)
from elastic_cache.reference.steps import (
    FACTOR,
    THRESHOLD,
    TOP_K,
    URGENT,
    commit,
    refresh_rows,
    rolling_rows,
    select_rows,
    token_confidence,
)

__all__ = [
    "FACTOR",
    "THRESHOLD",
    "TOP_K",
    "URGENT",
    "add_rms_norm",
    "cache_write",
    "commit",
    "drift_attention",
    "drift_decision",
    "drift_statistics",
    "linear",
    "output_mlp",
    "project_qkv",
    "refresh_rows",
    "rolling_rows",
    "select_rows",
    "swiglu",
    "token_confidence",
    "window_attention",
]
