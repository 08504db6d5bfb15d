"""project_qkv beside its parts as separate ops, 32 layers of the embedded model in turn.

The weights of all layers (27 MB with those of output_mlp) do not stay in a core's caches, as in a
real step; times are those of 32 calls.
"""

from __future__ import annotations

from elastic_cache import ops
from harness import Case, Data, num_bytes, run

NUM_LAYERS, WIDTH, HEADS, HEAD_DIM, CAPACITY = 32, 128, 4, 32, 350


def make_case(data: Data, num_rows: int) -> Case:
    residual, delta, hidden = (data.normal(num_rows, WIDTH) for _ in range(3))
    norm, rope = data.normal(WIDTH), data.rope(CAPACITY, HEAD_DIM)
    weights = [data.normal(WIDTH, 3 * WIDTH) for _ in range(NUM_LAYERS)]
    rows, qkv = data.slots(num_rows, CAPACITY), data.normal(num_rows, 3 * WIDTH)
    x_cache = data.normal(CAPACITY, WIDTH)
    caches = [data.normal(CAPACITY, HEADS, HEAD_DIM) for _ in range(3)]
    old = [data.normal(num_rows, HEADS, HEAD_DIM) for _ in range(2)]
    delta.zero_()  # the residual is to stay as it is, however often a layer runs

    def fused() -> None:
        for w in weights:
            ops.project_qkv(
                *(residual, delta, norm, 1e-5, w, None, rows, rope, CAPACITY, x_cache),
                *(*caches, *old, hidden, qkv),
            )

    def parts() -> None:
        for w in weights:
            ops.add_rms_norm(residual, delta, norm, 1e-5, hidden, rows, x_cache)
            ops.linear(hidden, w, None, qkv)
            ops.cache_write(qkv, rows, rope, CAPACITY, *caches, *old)

    flops = 2 * num_rows * WIDTH * 3 * WIDTH * NUM_LAYERS
    return Case(f"{num_rows} rows, 32 layers", fused, parts, num_bytes(*weights), flops)


if __name__ == "__main__":
    run("project_qkv", lambda data: [make_case(data, rows) for rows in (22, 30, 336)])
