"""add_rms_norm at the widths of the embedded model and of LLaDA-8B, layer-input cache included."""

from __future__ import annotations

import torch.nn.functional as F
from elastic_cache import ops
from harness import Case, Data, num_bytes, run

SIZES = ((19, 128), (350, 128), (19, 4096), (128, 4096))
EPS = 1e-5


def make_case(data: Data, num_rows: int, width: int) -> Case:
    residual, delta, out = (data.normal(num_rows, width) for _ in range(3))
    delta *= 1e-3  # the residual grows with every call
    weight, x_cache = data.normal(width), data.normal(2 * num_rows, width)
    rows = data.slots(num_rows, 2 * num_rows)
    slots = rows.long()

    def plain() -> None:
        residual.add_(delta)
        x_cache[slots] = residual
        F.rms_norm(residual, (width,), weight, EPS)

    return Case(
        f"{num_rows} rows x {width}",
        native=lambda: ops.add_rms_norm(residual, delta, weight, EPS, out, rows, x_cache),
        plain=plain,
        num_bytes=num_bytes(residual, residual, delta, weight, rows, residual, out),
    )


if __name__ == "__main__":
    run("add_rms_norm", lambda data: [make_case(data, *size) for size in SIZES])
