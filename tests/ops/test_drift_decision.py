"""drift_decision: the first layer in full mode, and the positions to track; all of it exact."""

from __future__ import annotations

import math

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
    rng: torch.Generator,
    device: torch.device,
    length: int,
    track_num: int = 2,
    num_sequences: int = 3,
    num_layers: int = 2,
) -> Case:
    """Few distinct masses, so that there are ties; NaN where nothing is eligible."""
    capacity = length + 3
    shape = (num_layers, num_sequences, capacity)
    mass = torch.randint(1, max(2, length // 2), shape, generator=rng) / 8
    masked = torch.rand(num_sequences, capacity, generator=rng) < 0.4
    mass[:, masked] = float("nan")
    first = [s % 3 for s in range(num_sequences)]
    for s in range(num_sequences):
        mass[:, s, : first[s]], mass[:, s, first[s] + length :] = float("nan"), float("nan")
    return {
        "similarity": torch.rand(num_layers, num_sequences, generator=rng).double().to(device),
        "gamma": torch.full((num_sequences,), 0.5, dtype=torch.float64, device=device),
        "mass": mass.to(device),
        "masked": masked.to(device),
        "key_range": int32([[f, f + length] for f in first], device).view(num_sequences, 2),
        "layer": 4,
        "first_full_layer": int32([9] * num_sequences, device),
        "tracked": poisoned(num_layers, num_sequences, track_num, dtype=torch.int32, device=device),
    }


def test_example(device: torch.device) -> None:
    """Position 2 is the best, 3 is masked, 0 is out of range, 1 and 4 tie."""
    first_full, tracked = int32([8], device), poisoned(1, 1, 3, dtype=torch.int32, device=device)
    ops.drift_decision(
        torch.tensor([[0.89]], dtype=torch.float64, device=device),
        torch.tensor([0.9], dtype=torch.float64, device=device),
        torch.tensor([[[9.0, 1.0, 2.0, 7.0, 1.0, 0.0]]], device=device),
        torch.tensor([[False, False, False, True, False, False]], device=device),
        int32([[1, 6]], device),
        2,
        first_full,
        tracked,
    )
    assert first_full.tolist() == [3]
    assert tracked.tolist() == [[[2, 1, 4]]]


@pytest.mark.parametrize("length", [*TILE_SIZES, 3000])
def test_sizes(device: torch.device, rng: torch.Generator, length: int) -> None:
    check_exact("drift_decision", make_case(rng, device, length))


@pytest.mark.parametrize("track_num", [0, 1, 3, 8, 17, 50])
def test_track_num(device: torch.device, rng: torch.Generator, track_num: int) -> None:
    """About 18 of 30 positions are eligible: 50 are never found."""
    check_exact("drift_decision", make_case(rng, device, 30, track_num))


def test_no_sequence(device: torch.device, rng: torch.Generator) -> None:
    check_exact("drift_decision", make_case(rng, device, 30, num_sequences=0))


@pytest.mark.parametrize("num_layers", [0, 1, 5, 33])
def test_layers(device: torch.device, rng: torch.Generator, num_layers: int) -> None:
    """The first layer that fails counts, whatever the later ones say."""
    case = make_case(rng, device, 30, num_layers=num_layers)
    case["first_full_layer"].fill_(99)
    case["gamma"].copy_(torch.tensor([0.02, 0.2, 0.7], dtype=torch.float64))
    check_exact("drift_decision", case)


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_equal_masses(device: torch.device, rng: torch.Generator, fill: float) -> None:
    """Ties go to the lower position; a mass of zero is eligible."""
    case = make_case(rng, device, 100, track_num=5)
    case["mass"].fill_(fill)
    check_exact("drift_decision", case)


@pytest.mark.parametrize("is_masked", [False, True])
def test_all_or_nothing_masked(device: torch.device, rng: torch.Generator, is_masked: bool) -> None:
    case = make_case(rng, device, 65, track_num=4)
    case["mass"].copy_(torch.rand(case["mass"].shape, generator=rng))
    case["masked"].fill_(is_masked)
    check_exact("drift_decision", case)


@pytest.mark.parametrize("gamma", [-1.0, 0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("layer", [0, 4, 31])
def test_thresholds(device: torch.device, rng: torch.Generator, gamma: float, layer: int) -> None:
    """A failure counts only before the first full layer; NaN and +inf are below no threshold."""
    values = [0.0, 0.5, math.nextafter(0.5, 0), 1.0, math.inf, math.nan]
    states = [-1, 0, layer, layer + 1, layer + 2, 32]
    case = make_case(rng, device, 9, num_sequences=len(values) * len(states), num_layers=1)
    case["similarity"] = torch.tensor([values * len(states)], dtype=torch.float64, device=device)
    case["first_full_layer"] = int32(states, device).repeat_interleave(len(values)).contiguous()
    case["gamma"].fill_(gamma)
    check_exact("drift_decision", {**case, "layer": layer})


def test_contract(device: torch.device, rng: torch.Generator) -> None:
    check_contract("drift_decision", make_case(rng, device, 900, track_num=7))


def test_rejects(device: torch.device, rng: torch.Generator) -> None:
    case = make_case(rng, device, 30)
    check_rejects_malformed("drift_decision", case)
    for name, bad in {
        "similarity": case["similarity"][:, 1:].contiguous(),
        "gamma": case["gamma"][1:],
        "masked": case["masked"][:, 1:].contiguous(),
        "key_range": case["key_range"][1:],
        "first_full_layer": case["first_full_layer"][1:],
        "tracked": case["tracked"][:, 1:].contiguous(),
    }.items():
        assert_rejected("drift_decision", {**case, name: bad}, name, "must be [")


def test_rejects_values(rng: torch.Generator) -> None:
    case = make_case(rng, torch.device("cpu"), 30)
    case["key_range"][1, 1] = 34
    assert_rejected("drift_decision", case, "key_range", "34")
