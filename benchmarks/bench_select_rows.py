"""select_rows of a step; plain torch is one sequence's row list by nonzero and unique.

On a GPU plain torch waits for the host at every nonzero and unique: this is what the op avoids.
"""

from __future__ import annotations

import torch
from elastic_cache import ops
from harness import Case, Data, num_bytes, run

SIZES = ((1, 350, 32, 16), (1, 4096, 32, 16), (8, 1024, 32, 32))


def make_case(data: Data, num_sequences: int, capacity: int, num_layers: int, window: int) -> Case:
    masked = data.coin(num_sequences, capacity, chance=0.4)
    committed = data.coin(num_sequences, capacity, chance=4 / capacity) & ~masked
    tracked = (capacity * data.uniform(num_layers, num_sequences, 1)).int()
    max_rows = num_sequences * (num_layers + window + 64)
    rows, window_rows = data.int32([0] * max_rows), data.int32([0] * max_rows)
    segments = data.int32([[0] * 5] * num_sequences)
    per_sequence = data.int32([window] * num_sequences)
    none = data.int32([0] * num_sequences)

    def plain() -> None:
        for s in range(num_sequences):
            listed = tracked[:, s].unique()
            fresh = committed[s].nonzero().flatten()
            masks = masked[s].nonzero().flatten()[:window]
            torch.cat((listed, fresh, masks)).add_(s * capacity)

    return Case(
        f"{num_sequences} x {capacity} positions, {num_layers} layers",
        native=lambda: ops.select_rows(
            masked, committed, tracked, per_sequence, none, rows, segments, window_rows
        ),
        plain=plain,
        num_bytes=num_bytes(masked, committed, tracked, rows, window_rows),
        plain_waits=True,
    )


if __name__ == "__main__":
    run("select_rows", lambda data: [make_case(data, *size) for size in SIZES])
