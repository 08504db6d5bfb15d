"""The native operators, one thin function each; nothing else calls them.

Every op writes into tensors it is given and returns nothing, so a step allocates nothing and its
addresses never change. Importing this module loads the shared object, see native.py.

Letters in the docstrings, as in csrc/include/elastic_cache/types.h:

    S sequences, each owning C (capacity) consecutive slots; N = S * C slots in all;
    slot = sequence * C + position; a row is one token computed in this step, R rows;
    H query heads, Hkv key/value heads (H % Hkv == 0), D head_dim, L layers, W window rows;
    "model" is the model's dtype, float32 or bfloat16, the same for all such arguments of a call.

`rows` is int32 [R], slots; a row whose slot is -1 is skipped and its outputs are zero.
`key_range` is int32 [S, 2], the first and one-past-last position of a sequence that may be read.
`segments` is int32 [S, 5]: where a sequence's rows begin in the row list, then how many of them
are tracked, newly committed, window and lookahead rows.

All tensors are contiguous unless said otherwise and on one device. A wrong argument raises
ValueError with a sentence that names op, argument, rule and what was seen; device, dtype, layout
and shape are checked on every device, the values of indices on the CPU only.

Sources: "Attention Is All You Need for KV Cache in Diffusion LLMs" (arXiv 2510.14973), called the
paper below, and Fast-dLLM (arXiv 2505.22618).
"""

from elastic_cache.ops.attention import (
    cache_write,
    drift_attention,
    drift_decision,
    drift_statistics,
    window_attention,
)
from elastic_cache.ops.layers import add_rms_norm, linear, output_mlp, project_qkv, swiglu
from elastic_cache.ops.steps import (
    commit,
    refresh_rows,
    rolling_rows,
    select_rows,
    token_confidence,
)

__all__ = [
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
