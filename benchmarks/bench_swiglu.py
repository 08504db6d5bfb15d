"""swiglu at the feed-forward widths of the embedded model and of LLaDA-8B."""

from __future__ import annotations

import torch.nn.functional as F
from elastic_cache import ops
from harness import Case, Data, num_bytes, run

SIZES = ((19, 384), (350, 384), (19, 12288), (128, 12288))


def make_case(data: Data, num_rows: int, width: int) -> Case:
    gate_up, out = data.normal(num_rows, 2 * width), data.normal(num_rows, width)
    gate, up = gate_up.chunk(2, dim=-1)
    return Case(
        f"{num_rows} rows x {width}",
        native=lambda: ops.swiglu(gate_up, out),
        plain=lambda: F.silu(gate) * up,
        num_bytes=num_bytes(gate_up, out),
    )


if __name__ == "__main__":
    run("swiglu", lambda data: [make_case(data, *size) for size in SIZES])
