"""drift_attention: window_attention, the mass of every key, and the cosine over heads."""

from __future__ import annotations

import math

import pytest
import torch
from driftcase import condition_of, make_case
from elastic_cache import ops
from opcase import (
    TILE_SIZES,
    Case,
    assert_rejected,
    check_close,
    check_contract,
    check_rejects_malformed,
    int32,
    run,
)
from schemas import SCHEMAS
from tolerance import assert_same_bits
from torch import Tensor


def check(case: Case) -> dict[str, Tensor]:
    """From float32 weights; out and lse are, in every bit, those of window_attention."""
    result = check_close(
        "drift_attention", case, arithmetic=torch.float32, condition=condition_of(case)
    )
    attention = {argument.name: case[argument.name] for argument in SCHEMAS["window_attention"]}
    for name, expected in run(ops, "window_attention", attention).items():
        assert_same_bits(f"drift_attention: {name}", result[name], expected)
    return result


@pytest.mark.parametrize("size", TILE_SIZES)
def test_window_rows(
    device: torch.device, rng: torch.Generator, dtype: torch.dtype, size: int
) -> None:
    check(make_case(rng, device, dtype, [(2, 3, size, 2), (1, 0, 4, 0)], [(0, 80), (2, 30)]))


@pytest.mark.parametrize("size", TILE_SIZES)
def test_tracked_rows(
    device: torch.device, rng: torch.Generator, dtype: torch.dtype, size: int
) -> None:
    check(make_case(rng, device, dtype, [(size, 3, 5, 2), (1, 0, 4, 0)], [(0, 80), (2, 30)]))


@pytest.mark.parametrize("num_keys", [*TILE_SIZES[4:], 127, 128, 129, 1500])
def test_keys(
    device: torch.device, rng: torch.Generator, dtype: torch.dtype, num_keys: int
) -> None:
    ranges = [(0, num_keys), (3, 3 + num_keys)]
    check(make_case(rng, device, dtype, [(2, 1, 4, 1), (1, 2, 3, 0)], ranges))


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2), (8, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [2, 6, 64, 128])
def test_heads(
    device: torch.device,
    rng: torch.Generator,
    dtype: torch.dtype,
    heads: tuple[int, int],
    head_dim: int,
) -> None:
    counts = [(2, 3, 9, 2), (0, 0, 7, 0), (1, 0, 0, 0)]
    check(make_case(rng, device, dtype, counts, [(0, 65), (0, 9), (7, 40)], heads, head_dim))


@pytest.mark.parametrize("drift", [0.0, 0.01, 3.0])
@pytest.mark.parametrize("scale", [0.0, 0.25, 8.0])
def test_drifts(
    device: torch.device, rng: torch.Generator, dtype: torch.dtype, drift: float, scale: float
) -> None:
    """At scale 8 most weights are so small that their norms are clamped."""
    counts, ranges = [(3, 1, 8, 0), (1, 1, 1, 1)], [(0, 70), (1, 50)]
    result = check(make_case(rng, device, dtype, counts, ranges, drift=drift, scale=scale))
    if drift == 0.0 and scale < 1:
        torch.testing.assert_close(result["similarity"].cpu(), torch.ones(2, dtype=torch.float64))


def test_mass_of_a_window_is_its_heads_and_rows(device: torch.device, rng: torch.Generator) -> None:
    """Every row of weights sums to one."""
    case = make_case(rng, device, torch.float32, [(1, 2, 10, 5), (0, 0, 3, 0)], [(0, 60), (4, 9)])
    total = run(ops, "drift_attention", case)["mass"].sum(1).cpu()
    torch.testing.assert_close(total, torch.tensor([40.0, 12.0]))


def test_nothing_tracked(device: torch.device, rng: torch.Generator, dtype: torch.dtype) -> None:
    """Without tracked rows there is no drift, and what was overwritten need not be given."""
    case = make_case(rng, device, dtype, [(0, 2, 8, 0), (0, 0, 3, 1)], [(0, 33), (2, 17)])
    assert check(case)["similarity"].tolist() == [math.inf, math.inf]
    check({**case, "q_old": None, "k_old": None})


def test_skipped_rows(device: torch.device, rng: torch.Generator, dtype: torch.dtype) -> None:
    """-1 inside a segment, with NaN in all that belongs to the row."""
    case = make_case(rng, device, dtype, [(4, 2, 9, 2), (1, 0, 4, 0)], [(0, 80), (2, 30)])
    for row in (1, 7, 9, 17):  # tracked; window; window; the only tracked row of sequence 1
        skipped = int(case["rows"][row])
        case["k_cache"][skipped] = case["k_old"][row]  # never written
        for name in ("q_old", "k_old"):
            case[name][row] = float("nan")
        case["q_cache"][skipped] = float("nan")
        case["rows"][row] = -1
    assert check(case)["similarity"][1] == math.inf


def test_no_row_and_no_key(device: torch.device, rng: torch.Generator, dtype: torch.dtype) -> None:
    counts, ranges = [(0, 0, 0, 0), (0, 0, 0, 0)], [(0, 9), (4, 4)]
    result = check(make_case(rng, device, dtype, counts, ranges))
    assert not result["mass"].any()
    assert result["similarity"].tolist() == [math.inf, math.inf]


def test_contract(device: torch.device, rng: torch.Generator, dtype: torch.dtype) -> None:
    counts, ranges = [(6, 4, 16, 2), (3, 3, 20, 0)], [(0, 400), (11, 333)]
    check_contract("drift_attention", make_case(rng, device, dtype, counts, ranges, (4, 2), 64))


def test_rejects(device: torch.device, rng: torch.Generator) -> None:
    counts, ranges = [(2, 1, 4, 1), (1, 2, 3, 0)], [(0, 20), (3, 23)]
    case = make_case(rng, device, torch.float32, counts, ranges)
    check_rejects_malformed("drift_attention", case)
    for name, bad in {
        "k_cache": case["k_cache"][1:],
        "v_cache": case["v_cache"][:, 1:].contiguous(),
        "q_old": case["q_old"][1:],
        "k_old": case["k_old"][..., 1:].contiguous(),
        "segments": case["segments"][:, 1:].contiguous(),
        "key_range": case["key_range"][1:],
        "out": case["out"][1:],
        "lse": case["lse"][:, 1:].contiguous(),
        "mass": case["mass"][:, 1:].contiguous(),
        "similarity": case["similarity"][1:],
    }.items():
        assert_rejected("drift_attention", {**case, name: bad}, name, "must be [")


def test_rejects_values(rng: torch.Generator) -> None:
    device = torch.device("cpu")
    counts, ranges = [(2, 1, 4, 1), (1, 2, 3, 0)], [(0, 20), (3, 23)]
    case = make_case(rng, device, torch.float32, counts, ranges)
    assert_rejected("drift_attention", {**case, "q_old": None, "k_old": None}, "q_old", "tracked")
    for bad in ([8, 1, 2, 30, 0], [-1, 1, 2, 3, 0], [8, 1, -2, 3, 0]):
        segments = case["segments"].clone()
        segments[1] = int32(bad, device)
        assert_rejected("drift_attention", {**case, "segments": segments}, "segments", "got")
    bad_range = int32([[0, 20], [3, 99]], device)
    assert_rejected("drift_attention", {**case, "key_range": bad_range}, "key_range", "got")
    case["rows"][4] = len(case["q_cache"])
    assert_rejected("drift_attention", case, "rows", str(len(case["q_cache"])))
