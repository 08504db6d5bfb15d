"""linear at the projections of the embedded model (one layer's four) and of LLaDA-8B."""

from __future__ import annotations

import torch
from elastic_cache import ops
from harness import Case, Data, num_bytes, run

TINY = ((128, 384), (128, 128), (128, 768), (384, 128))
SIZES = [(rows, *shape) for rows in (19, 30, 350) for shape in TINY] + [(32, 4096, 4096)]


def make_case(data: Data, num_rows: int, in_features: int, out_features: int) -> Case:
    x, weight = data.normal(num_rows, in_features), data.normal(in_features, out_features)
    out = data.normal(num_rows, out_features)
    return Case(
        f"{num_rows} rows, {in_features} -> {out_features}",
        native=lambda: ops.linear(x, weight, None, out, False),
        plain=lambda: torch.mm(x, weight, out=out),
        num_bytes=num_bytes(x, weight, out),
    )


if __name__ == "__main__":
    run("linear", lambda data: [make_case(data, *size) for size in SIZES])
