"""refresh_rows at a layer where every other sequence runs in full; plain torch is a nonzero."""

from __future__ import annotations

import torch
from elastic_cache import ops
from harness import Case, Data, num_bytes, run

SIZES = ((1, 350), (1, 4096), (8, 1024))


def make_case(data: Data, num_sequences: int, capacity: int) -> Case:
    first_full = data.int32([4 * (s % 2) for s in range(num_sequences)])
    key_range = data.int32([[0, capacity - s] for s in range(num_sequences)])
    rows = data.int32([0] * num_sequences * capacity)
    offsets = data.int32([0] * (num_sequences + 1))
    position = torch.arange(capacity, device=data.device)

    def plain() -> None:
        in_range = (position >= key_range[:, :1]) & (position < key_range[:, 1:])
        is_full = in_range & (first_full <= 3)[:, None]
        is_full.flatten().nonzero()
        is_full.sum(1).cumsum(0)

    return Case(
        f"{num_sequences} x {capacity} positions",
        native=lambda: ops.refresh_rows(first_full, key_range, 3, capacity, rows, offsets),
        plain=plain,
        num_bytes=num_bytes(rows, offsets, key_range),
        plain_waits=True,
    )


if __name__ == "__main__":
    run("refresh_rows", lambda data: [make_case(data, *size) for size in SIZES])
