"""rolling_rows: the positions computed longest ago, all of it exact."""

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

CPU = torch.device("cpu")
LARGEST = torch.iinfo(torch.int32).max


def make_case(
    rng: torch.Generator,
    device: torch.device,
    capacity: int,
    num_sequences: int = 2,
    window: int = 5,
    num_rows: int = 24,
    max_chosen: int = 64,
) -> Case:
    """Disjoint masked and committed positions; many ages are equal, one is the greatest."""
    kind = torch.rand(num_sequences, capacity, generator=rng)
    ages = torch.randint(9, (num_sequences, capacity), generator=rng, dtype=torch.int32)
    ages[torch.rand(ages.shape, generator=rng) < 0.02] = LARGEST
    ends = [[min(s, capacity), capacity - capacity // 7] for s in range(num_sequences)]
    return {
        "masked": (kind < 0.4).to(device),
        "committed": (kind > 0.95).to(device),
        "window": int32([window + s for s in range(num_sequences)], device),
        "num_rows": int32([num_rows + s for s in range(num_sequences)], device),
        "key_range": int32(ends, device).reshape(-1, 2),
        "age": ages.to(device),
        "chosen": poisoned(num_sequences, max_chosen, dtype=torch.int32, device=device),
    }


def test_example(device: torch.device) -> None:
    """Two sequences of 8 positions, worked out by hand."""
    masked, committed = (
        torch.tensor([[c != "_" for c in sequence] for sequence in flags], device=device)
        for flags in (["____mmmm", "mmmmmmmm"], ["_c______", "________"])
    )
    # Sequence 0 computes 1 (committed) and 4, 5 (window); of 0, 2, 3, 6, 7 the oldest two.
    # Sequence 1 computes 0 .. 2, and no row is left.
    age = int32([[3, 9, 1, 5, 0, 0, 5, 3], [7, 7, 7, 7, 7, 7, 7, 7]], device)
    chosen = poisoned(2, 4, dtype=torch.int32, device=device)
    ops.rolling_rows(
        masked,
        committed,
        int32([2, 3], device),
        int32([5, 3], device),
        int32([[0, 8], [0, 7]], device),
        age,
        chosen,
    )
    assert chosen.tolist() == [[3, 6, -1, -1], [-1, -1, -1, -1]]
    assert age.tolist() == [[4, 0, 2, 0, 0, 0, 0, 4], [0, 0, 0, 8, 8, 8, 8, 7]]


@pytest.mark.parametrize("capacity", [*TILE_SIZES, 1024, 1025, 4096])
def test_sizes(device: torch.device, rng: torch.Generator, capacity: int) -> None:
    check_exact("rolling_rows", make_case(rng, device, capacity))


@pytest.mark.parametrize("num_rows", [*TILE_SIZES, 400])
def test_budgets(device: torch.device, rng: torch.Generator, num_rows: int) -> None:
    """None, some and all positions; more than `chosen` holds are not chosen."""
    check_exact("rolling_rows", make_case(rng, device, 300, num_rows=num_rows))


@pytest.mark.parametrize("max_chosen", [0, 1, 300])
def test_room(device: torch.device, rng: torch.Generator, max_chosen: int) -> None:
    case = make_case(rng, device, 300, num_rows=350, max_chosen=max_chosen)
    check_exact("rolling_rows", case)


def test_no_sequence(device: torch.device, rng: torch.Generator) -> None:
    check_exact("rolling_rows", make_case(rng, device, 8, num_sequences=0))


def test_every_position_has_its_turn(device: torch.device) -> None:
    """With nothing to decode, a budget of 3 goes through 10 positions again and again."""
    nothing = torch.zeros(1, 10, dtype=torch.bool, device=device)
    age = torch.zeros(1, 10, dtype=torch.int32, device=device)
    chosen = poisoned(1, 3, dtype=torch.int32, device=device)
    for _ in range(10):
        ops.rolling_rows(
            nothing,
            nothing,
            int32([4], device),
            int32([3], device),
            int32([[0, 10]], device),
            age,
            chosen,
        )
        assert age[0, chosen[0].long()].tolist() == [0, 0, 0]
        assert int(age.max()) <= 3
    assert age[0].unique().tolist() == [0, 1, 2, 3]


def test_contract(device: torch.device, rng: torch.Generator) -> None:
    check_contract("rolling_rows", make_case(rng, device, 70))


def test_rejects_malformed(rng: torch.Generator) -> None:
    check_rejects_malformed("rolling_rows", make_case(rng, CPU, 70))


def test_rejects_bad_ranges(rng: torch.Generator) -> None:
    case = {**make_case(rng, CPU, 70), "key_range": int32([[0, 71], [0, 3]], CPU)}
    assert_rejected("rolling_rows", case, "key_range", "71")
