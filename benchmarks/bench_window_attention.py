"""window_attention of a step's rows over cached sequences; plain torch is its fused attention.

Plain torch is given contiguous heads-first keys and values and returns no log-sum-exp: less work.
Layers are taken in turn, as a step does, so that keys and values of many come from memory.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from elastic_cache import ops
from harness import Case, Data, num_bytes, run

SIZES = (
    # sequences, rows of each, keys of each, heads, kv_heads, head_dim, layers
    (1, 19, 350, 4, 4, 32, 1),
    (1, 350, 350, 4, 4, 32, 1),
    (8, 10, 350, 4, 4, 32, 32),
    (8, 32, 350, 4, 4, 32, 32),
    (1, 19, 1024, 32, 32, 128, 1),
    (1, 32, 1024, 32, 8, 128, 1),
    (8, 32, 350, 32, 32, 128, 4),
)


def make_case(
    data: Data,
    sequences: int,
    num_rows: int,
    num_keys: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    layers: int,
) -> Case:
    count = sequences * num_keys
    caches = [
        tuple(data.normal(count, h, head_dim) for h in (heads, kv_heads, kv_heads))
        for _ in range(layers)
    ]
    listed = [data.slots(num_rows, num_keys) + s * num_keys for s in range(sequences)]
    rows, key_range = torch.cat(listed), data.int32([[0, num_keys]] * sequences)
    segments = data.int32([[s * num_rows, 0, 0, num_rows, 0] for s in range(sequences)])
    out = data.normal(sequences * num_rows, heads, head_dim)
    lse = data.normal(sequences * num_rows, heads, dtype=torch.float32)
    slots, scale = rows.long(), 1 / math.sqrt(head_dim)
    is_gqa = heads != kv_heads

    def heads_first(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(0, (sequences, -1)).transpose(1, 2)

    copies = [(q, heads_first(k).contiguous(), heads_first(v).contiguous()) for q, k, v in caches]
    native_turn, plain_turn = itertools.cycle(caches), itertools.cycle(copies)

    def native() -> None:
        q, k, v = next(native_turn)
        ops.window_attention(q, k, v, rows, segments, key_range, scale, out, lse)

    def plain() -> None:
        q, keys, values = next(plain_turn)
        F.scaled_dot_product_attention(heads_first(q[slots]), keys, values, enable_gqa=is_gqa)

    _, k, v = caches[0]
    many = f"{sequences} x " if sequences > 1 else ""
    return Case(
        f"{many}{num_rows} rows, {num_keys} keys, {heads}/{kv_heads} x {head_dim}",
        native=native,
        plain=plain,
        num_bytes=num_bytes(k, v, out, out, lse),
        num_flops=4 * sequences * num_rows * num_keys * heads * head_dim,
    )


if __name__ == "__main__":
    run("window_attention", lambda data: [make_case(data, *size) for size in SIZES])
