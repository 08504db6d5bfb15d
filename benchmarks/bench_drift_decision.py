"""drift_decision of one layer or 32; plain torch: a masked top-k and a comparison, no sync."""

from __future__ import annotations

import torch
from elastic_cache import ops
from harness import Case, Data, num_bytes, run

SIZES = ((1, 1, 350, 1), (1, 1, 4096, 1), (1, 8, 1024, 4), (32, 1, 1024, 1))


def make_case(
    data: Data, num_layers: int, num_sequences: int, capacity: int, track_num: int
) -> Case:
    mass = data.uniform(num_layers, num_sequences, capacity)
    masked = data.coin(num_sequences, capacity, chance=0.4)
    similarity = data.uniform(num_layers, num_sequences, dtype=torch.float64)
    gamma = data.uniform(num_sequences, dtype=torch.float64)
    key_range = data.int32([[0, capacity]] * num_sequences)
    first_full = data.int32([9] * num_sequences)
    tracked = data.int32([[[0] * track_num] * num_sequences] * num_layers)

    def plain() -> None:
        layers = torch.arange(5, 5 + num_layers, dtype=torch.int32, device=data.device)[:, None]
        failing = torch.where(similarity < gamma, layers, first_full).amin(0)
        first_full.copy_(torch.minimum(first_full, failing))
        tracked.copy_(mass.masked_fill(masked, 0.0).topk(track_num).indices)

    return Case(
        f"{num_layers} x {num_sequences} x {capacity} positions, {track_num} tracked",
        native=lambda: ops.drift_decision(
            similarity, gamma, mass, masked, key_range, 4, first_full, tracked
        ),
        plain=plain,
        num_bytes=num_bytes(mass, masked, tracked),
    )


if __name__ == "__main__":
    run("drift_decision", lambda data: [make_case(data, *size) for size in SIZES])
