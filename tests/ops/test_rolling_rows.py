"""rolling_rows: the positions most due, all of it exact."""

from __future__ import annotations

import pytest
import torch
from elastic_cache import ops
from elastic_cache.reference import URGENT
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
    ahead: int = 4,
    repeats: int = 2,
    reach: int = 16,
) -> Case:
    """Disjoint masked and committed positions; many are equally due, some urgent, one the most."""
    kind = torch.rand(num_sequences, capacity, generator=rng)
    due = 512 * torch.randint(9, (num_sequences, capacity), generator=rng, dtype=torch.int32)
    urgent = torch.rand(due.shape, generator=rng) < 0.05
    due[urgent] += URGENT * torch.randint(1, 4, (int(urgent.sum()),), generator=rng).int()
    due[torch.rand(due.shape, generator=rng) < 0.02] = LARGEST
    ends = [[min(s, capacity), capacity - capacity // 7] for s in range(num_sequences)]
    return {
        "masked": (kind < 0.4).to(device),
        "committed": (kind > 0.95).to(device),
        "window": int32([window + s for s in range(num_sequences)], device),
        "num_rows": int32([num_rows + s for s in range(num_sequences)], device),
        "key_range": int32(ends, device).reshape(-1, 2),
        "ahead": ahead,
        "repeats": repeats,
        "reach": reach,
        "due": due.to(device),
        "chosen": poisoned(num_sequences, max_chosen, dtype=torch.int32, device=device),
    }


def test_example(device: torch.device) -> None:
    """Three sequences of 8 positions, worked out by hand: reach 3, one ahead, two repeats."""
    masked, committed = (
        torch.tensor([[c != "_" for c in sequence] for sequence in flags], device=device)
        for flags in (
            ["____mmmm", "mmmmmmmm", "________"],
            ["_c______", "________", "____c___"],
        )
    )
    due = int32(
        [[0, 5, 0, 0, 9, 9, 0, 0], [7] * 8, [2 * URGENT + 5, 0, 0, 0, 0, 0, 0, 300]], device
    )
    chosen = poisoned(3, 4, dtype=torch.int32, device=device)
    ops.rolling_rows(
        masked,
        committed,
        int32([2, 3, 2], device),
        int32([5, 3, 3], device),
        int32([[0, 8], [0, 7], [0, 8]], device),
        1,
        2,
        3,
        due,
        chosen,
    )
    # Sequence 0 computes 1 (committed) and 4, 5 (window). Of 0, 2, 3, 6, 7 it has room for two: 6
    # is ahead of the window, and 3 lies next to it.
    # Sequence 1 computes 0 .. 2, and no row is left; 3 is ahead, and 7 is not its own.
    # Sequence 2 computes 4; 0 is urgent, and 7, one from the end, was due by 300 before.
    assert chosen.tolist() == [[3, 6, -1, -1], [-1, -1, -1, -1], [0, 7, -1, -1]]
    assert due.tolist() == [
        [3072 // 7, 2 * URGENT, 3072 // 5, 0, 0, 0, 0, 3072 // 6],
        [0, 0, 0, URGENT, 7 + 3072 // 7, 7 + 3072 // 8, 7 + 3072 // 9, 7],
        [URGENT, 3072 // 10, 3072 // 9, 3072 // 8, 2 * URGENT, 3072 // 6, 3072 // 5, 0],
    ]


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


@pytest.mark.parametrize("ahead", [0, 1, 9, 400])
def test_ahead(device: torch.device, rng: torch.Generator, ahead: int) -> None:
    check_exact("rolling_rows", make_case(rng, device, 300, ahead=ahead))


@pytest.mark.parametrize("repeats", [0, 1, 1024])
def test_repeats(device: torch.device, rng: torch.Generator, repeats: int) -> None:
    check_exact("rolling_rows", make_case(rng, device, 300, repeats=repeats))


@pytest.mark.parametrize("reach", [1, 100, 2**20])
def test_reach(device: torch.device, rng: torch.Generator, reach: int) -> None:
    check_exact("rolling_rows", make_case(rng, device, 4096, reach=reach))


def test_every_position_has_its_turn(device: torch.device) -> None:
    """With nothing to decode, a budget of 3 comes to all of 10 positions, most often to the last
    ones, which lie next to where the window would be."""
    nothing = torch.zeros(1, 10, dtype=torch.bool, device=device)
    due = torch.zeros(1, 10, dtype=torch.int32, device=device)
    chosen = poisoned(1, 3, dtype=torch.int32, device=device)
    turns = torch.zeros(10, dtype=torch.int64)
    for _ in range(100):
        ops.rolling_rows(
            nothing,
            nothing,
            int32([4], device),
            int32([3], device),
            int32([[0, 10]], device),
            8,
            3,
            4,
            due,
            chosen,
        )
        assert due[0, chosen[0].long()].tolist() == [0, 0, 0]
        turns[chosen[0].long().cpu()] += 1
    assert turns.tolist() == sorted(turns.tolist())
    assert int(turns.min()) > 10 and int(turns.max()) > 1.5 * int(turns.min())


def test_contract(device: torch.device, rng: torch.Generator) -> None:
    check_contract("rolling_rows", make_case(rng, device, 70))


def test_rejects_malformed(rng: torch.Generator) -> None:
    check_rejects_malformed("rolling_rows", make_case(rng, CPU, 70))


def test_rejects_bad_ranges(rng: torch.Generator) -> None:
    case = {**make_case(rng, CPU, 70), "key_range": int32([[0, 71], [0, 3]], CPU)}
    assert_rejected("rolling_rows", case, "key_range", "71")


@pytest.mark.parametrize(
    ("argument", "value", "rule"),
    [
        ("ahead", -1, "at least 0, got -1"),
        ("repeats", -1, "between 0 and 1024, got -1"),
        ("repeats", 1025, "between 0 and 1024, got 1025"),
        ("reach", 0, "between 1 and 1048576, got 0"),
        ("reach", 2**20 + 1, "between 1 and 1048576, got 1048577"),
    ],
)
def test_rejects_bad_numbers(rng: torch.Generator, argument: str, value: int, rule: str) -> None:
    assert_rejected("rolling_rows", {**make_case(rng, CPU, 70), argument: value}, argument, rule)
