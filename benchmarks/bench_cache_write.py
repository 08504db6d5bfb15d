"""cache_write, saving what it overwrites, at the head shapes of the embedded model and LLaDA-8B."""

from __future__ import annotations

import torch
from elastic_cache import ops
from harness import Case, Data, num_bytes, run

SIZES = (
    (19, 350, 4, 4, 32),
    (350, 350, 4, 4, 32),
    (19, 1024, 32, 32, 128),
    (128, 1024, 32, 8, 128),
)


def make_case(
    data: Data, num_rows: int, capacity: int, heads: int, kv_heads: int, head_dim: int
) -> Case:
    qkv = data.normal(num_rows, (heads + 2 * kv_heads) * head_dim)
    rows, rope = data.slots(num_rows, capacity), data.rope(capacity, head_dim)
    slots = rows.long()
    caches = [data.normal(capacity, h, head_dim) for h in (heads, kv_heads, kv_heads)]
    old = [data.normal(num_rows, h, head_dim) for h in (heads, kv_heads)]

    def plain() -> None:
        split = qkv.view(num_rows, -1, head_dim).split((heads, kv_heads, kv_heads), dim=1)
        cos, sin = rope[slots, None].chunk(2, dim=-1)
        for cache, saved, x in zip(caches[:2], old, split[:2], strict=True):
            saved.copy_(cache[slots])
            left, right = x.float().chunk(2, dim=-1)
            turned = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
            cache[slots] = turned.to(cache.dtype)
        caches[2][slots] = split[2]

    return Case(
        f"{num_rows} rows, {heads}/{kv_heads} heads of {head_dim}",
        native=lambda: ops.cache_write(qkv, rows, rope, capacity, None, *caches, *old),
        plain=plain,
        num_bytes=2 * num_bytes(qkv, *old) + num_bytes(rope[:num_rows], rows),
    )


if __name__ == "__main__":
    run("cache_write", lambda data: [make_case(data, *size) for size in SIZES])
