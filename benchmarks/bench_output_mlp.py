"""output_mlp beside its parts as separate ops, 32 layers of the embedded model in turn.

The weights of all layers do not stay in a core's caches, as in a real step; times are those of 32
calls.
"""

from __future__ import annotations

from elastic_cache import ops
from harness import Case, Data, num_bytes, run
from torch import Tensor

NUM_LAYERS, WIDTH, FFN = 32, 128, 384


def make_case(data: Data, num_rows: int) -> Case:
    attention, residual, hidden, delta = (data.normal(num_rows, WIDTH) for _ in range(4))
    gate_up, activation = data.normal(num_rows, 2 * FFN), data.normal(num_rows, FFN)
    norm = data.normal(WIDTH)

    def layer() -> tuple[Tensor, Tensor, Tensor]:
        shapes = ((WIDTH, WIDTH), (WIDTH, 2 * FFN), (FFN, WIDTH))
        out, both, down = (data.normal(*shape) for shape in shapes)
        return out, both, down

    layers = [layer() for _ in range(NUM_LAYERS)]
    buffers = (hidden, gate_up, activation, delta)

    def fused() -> None:
        for out, both, down in layers:
            ops.output_mlp(attention, out, residual, norm, 1e-5, both, down, *buffers)

    def parts() -> None:
        for out, both, down in layers:
            ops.linear(attention, out, None, delta)
            ops.add_rms_norm(residual, delta, norm, 1e-5, hidden, None, None)
            ops.linear(hidden, both, None, gate_up)
            ops.swiglu(gate_up, activation)
            ops.linear(activation, down, None, delta)

    weights = [matrix for matrices in layers for matrix in matrices]
    flops = 2 * num_rows * sum(matrix.numel() for matrix in weights)
    return Case(f"{num_rows} rows, 32 layers", fused, parts, num_bytes(*weights), flops)


if __name__ == "__main__":
    run("output_mlp", lambda data: [make_case(data, rows) for rows in (22, 30, 336)])
