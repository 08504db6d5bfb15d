"""project_qkv beside its parts as separate ops, many layers in turn.

On the CPU the 32 layers of the embedded model, on a GPU 4 of LLaDA-8B's: as in a real step, the
weights do not stay in the caches. Times are those of all layers.
"""

from __future__ import annotations

from elastic_cache import ops
from harness import Case, Data, num_bytes, run

TINY, LLADA_8B = (32, 128, 4, 32, 350), (4, 4096, 32, 128, 1024)
"""Layers, width, heads, head_dim, capacity."""
ROWS = (22, 32, 64, 336)


def make_case(data: Data, num_rows: int) -> Case:
    num_layers, width, heads, head_dim, capacity = TINY if data.on_cpu else LLADA_8B
    residual, delta, hidden = (data.normal(num_rows, width) for _ in range(3))
    norm, rope = data.normal(width), data.rope(capacity, head_dim)
    weights = [data.normal(width, 3 * width) for _ in range(num_layers)]
    rows, qkv = data.slots(num_rows, capacity), data.normal(num_rows, 3 * width)
    x_cache = data.normal(capacity, width)
    caches = [data.normal(capacity, heads, head_dim) for _ in range(3)]
    old = [data.normal(num_rows, heads, head_dim) for _ in range(2)]
    delta.zero_()  # the residual is to stay as it is, however often a layer runs

    def fused() -> None:
        for w in weights:
            ops.project_qkv(
                *(residual, delta, norm, 1e-5, w, None, rows, rope, capacity, None, x_cache),
                *(*caches, *old, hidden, qkv, False),
            )

    def parts() -> None:
        for w in weights:
            ops.add_rms_norm(residual, delta, norm, 1e-5, hidden, rows, x_cache)
            ops.linear(hidden, w, None, qkv, False)
            ops.cache_write(qkv, rows, rope, capacity, None, *caches, *old)

    flops = 2 * num_rows * width * 3 * width * num_layers
    return Case(f"{num_rows} rows, {num_layers} layers", fused, parts, num_bytes(*weights), flops)


if __name__ == "__main__":
    run("project_qkv", lambda data: [make_case(data, rows) for rows in ROWS])
