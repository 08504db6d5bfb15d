"""window_attention of a step's rows over a cached sequence; plain torch is its fused attention.

Plain torch is given contiguous heads-first keys and values and returns no log-sum-exp: less work.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from elastic_cache import ops
from harness import Case, Data, num_bytes, run

SIZES = (
    (19, 350, 4, 4, 32),
    (350, 350, 4, 4, 32),
    (19, 1024, 32, 32, 128),
    (32, 1024, 32, 8, 128),
)


def make_case(
    data: Data, num_rows: int, num_keys: int, heads: int, kv_heads: int, head_dim: int
) -> Case:
    q, k, v = (data.normal(num_keys, h, head_dim) for h in (heads, kv_heads, kv_heads))
    rows, key_range = data.slots(num_rows, num_keys), data.int32([[0, num_keys]])
    out = data.normal(num_rows, heads, head_dim)
    lse = data.normal(num_rows, heads, dtype=torch.float32)
    slots, scale = rows.long(), 1 / math.sqrt(head_dim)
    keys, values = (x.transpose(0, 1).contiguous() for x in (k, v))
    is_gqa = heads != kv_heads

    def plain() -> None:
        query = q[slots].transpose(0, 1)
        F.scaled_dot_product_attention(query[None], keys[None], values[None], enable_gqa=is_gqa)

    return Case(
        f"{num_rows} rows, {num_keys} keys, {heads}/{kv_heads} x {head_dim}",
        native=lambda: ops.window_attention(q, k, v, rows, key_range, scale, out, lse),
        plain=plain,
        num_bytes=num_bytes(k, v, out, out, lse),
        num_flops=4 * num_rows * num_keys * heads * head_dim,
    )


if __name__ == "__main__":
    run("window_attention", lambda data: [make_case(data, *size) for size in SIZES])
