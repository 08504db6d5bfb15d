"""output_mlp beside its parts as separate ops, many layers in turn.

On the CPU the 32 layers of the embedded model, on a GPU 4 of LLaDA-8B's: as in a real step, the
weights do not stay in the caches. Times are those of all layers.
"""

from __future__ import annotations

from elastic_cache import ops
from harness import Case, Data, num_bytes, run
from torch import Tensor

TINY, LLADA_8B = (32, 128, 384), (4, 4096, 12288)
"""Layers, width, ffn_width."""
ROWS = (22, 32, 64, 336)


def make_case(data: Data, num_rows: int) -> Case:
    num_layers, width, ffn = TINY if data.on_cpu else LLADA_8B
    attention, residual, hidden, delta = (data.normal(num_rows, width) for _ in range(4))
    gate_up, activation = data.normal(num_rows, 2 * ffn), data.normal(num_rows, ffn)
    norm = data.normal(width)

    def layer() -> tuple[Tensor, Tensor, Tensor]:
        shapes = ((width, width), (width, 2 * ffn), (ffn, width))
        out, both, down = (data.normal(*shape) for shape in shapes)
        return out, both, down

    layers = [layer() for _ in range(num_layers)]
    buffers = (hidden, gate_up, activation, delta)

    def fused() -> None:
        for out, both, down in layers:
            ops.output_mlp(attention, out, residual, norm, 1e-5, both, down, *buffers, False)

    def parts() -> None:
        for out, both, down in layers:
            ops.linear(attention, out, None, delta, False)
            ops.add_rms_norm(residual, delta, norm, 1e-5, hidden, None, None)
            ops.linear(hidden, both, None, gate_up, False)
            ops.swiglu(gate_up, activation)
            ops.linear(activation, down, None, delta, False)

    weights = [matrix for matrices in layers for matrix in matrices]
    flops = 2 * num_rows * sum(matrix.numel() for matrix in weights)
    return Case(f"{num_rows} rows, {num_layers} layers", fused, parts, num_bytes(*weights), flops)


if __name__ == "__main__":
    run("output_mlp", lambda data: [make_case(data, rows) for rows in ROWS])
