"""refresh_rows: all positions of the sequences that run in full mode at a layer; exact."""

from __future__ import annotations

import pytest
import torch
from elastic_cache import ops
from opcase import (
    TILE_SIZES,
    Case,
    assert_rejected,
    check_contract,
    check_exact,
    check_rejects_malformed,
    int32,
    poisoned,
)


def make_case(
    device: torch.device, lengths: list[int], first_full: list[int], layer: int = 3
) -> Case:
    capacity = max(lengths, default=0) + 2
    first = [s % 3 if length else 0 for s, length in enumerate(lengths)]
    return {
        "first_full_layer": int32(first_full, device),
        "key_range": int32(
            [[f, max(f, n)] for f, n in zip(first, lengths, strict=True)], device
        ).view(len(lengths), 2),
        "layer": layer,
        "capacity": capacity,
        "rows": poisoned(sum(lengths) + 3, dtype=torch.int32, device=device),
        "offsets": poisoned(len(lengths) + 1, dtype=torch.int32, device=device),
    }


def test_example(device: torch.device) -> None:
    """Sequence 0 fails at layer 1, so layer 2 on is full; sequence 1 not; sequence 2 is step 0."""
    rows = poisoned(7, dtype=torch.int32, device=device)
    offsets = poisoned(4, dtype=torch.int32, device=device)
    first_full, key_range = int32([2, 4, -1], device), int32([[0, 3], [0, 4], [1, 3]], device)
    ops.refresh_rows(first_full, key_range, 2, 10, rows, offsets)
    assert rows.tolist() == [0, 1, 2, 21, 22, -1, -1]
    assert offsets.tolist() == [0, 3, 3, 5]
    ops.refresh_rows(first_full, key_range, 1, 10, rows, offsets)
    assert rows.tolist() == [21, 22, -1, -1, -1, -1, -1]
    assert offsets.tolist() == [0, 0, 0, 2]


@pytest.mark.parametrize("length", [*TILE_SIZES, 5000])
def test_sizes(device: torch.device, length: int) -> None:
    check_exact("refresh_rows", make_case(device, [length, length + 1, length], [3, 4, 2]))


@pytest.mark.parametrize("layer", [0, 1, 2, 3, 4, 32])
def test_layers(device: torch.device, layer: int) -> None:
    check_exact("refresh_rows", make_case(device, [9, 8, 7, 6, 5], [-1, 0, 1, 3, 32], layer))


def test_no_sequence(device: torch.device) -> None:
    check_exact("refresh_rows", make_case(device, [], []))


def test_exactly_full_row_list(device: torch.device) -> None:
    case = make_case(device, [10, 20], [3, 3])
    count = int(case["key_range"].diff().sum())
    check_exact("refresh_rows", {**case, "rows": case["rows"][:count].clone()})


def test_contract(device: torch.device) -> None:
    check_contract("refresh_rows", make_case(device, [1000, 3, 800, 0, 500], [0, 3, 9, 1, 2]))


def test_rejects(device: torch.device) -> None:
    case = make_case(device, [10, 20], [3, 3])
    check_rejects_malformed("refresh_rows", case)
    for name, bad in {
        "key_range": case["key_range"][1:],
        "offsets": case["offsets"][1:],
    }.items():
        assert_rejected("refresh_rows", {**case, name: bad}, name, "must be [")
    assert_rejected("refresh_rows", {**case, "capacity": -1}, "capacity", "got -1")


def test_rejects_values() -> None:
    """What is in a tensor is looked at on the CPU, where it costs nothing."""
    case = make_case(torch.device("cpu"), [10, 20], [3, 3])
    for bad in ([[0, 10], [0, 23]], [[-1, 10], [0, 5]], [[0, 10], [5, 4]]):
        bad_range = torch.tensor(bad, dtype=torch.int32)
        assert_rejected("refresh_rows", {**case, "key_range": bad_range}, "key_range", "got")
    with pytest.raises((ValueError, RuntimeError), match=r"refresh_rows: rows .*4"):
        ops.refresh_rows(*{**case, "rows": case["rows"][:4].clone()}.values())
