"""drift_attention: window_attention, the mass of every key, and the cosine over heads.

Cases are made the way a step makes them: a cache, rows written over it, what they overwrote.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from elastic_cache import ops
from opcase import (
    TILE_SIZES,
    Case,
    assert_rejected,
    check_close,
    check_contract,
    check_rejects_malformed,
    int32,
    normal,
    poisoned,
    run,
)
from schemas import SCHEMAS
from tolerance import assert_same_bits
from torch import Tensor

Counts = tuple[int, int, int, int]
"""Rows of a sequence: tracked, committed, window, lookahead."""


def make_case(
    rng: torch.Generator,
    device: torch.device,
    dtype: torch.dtype,
    counts: list[Counts],
    key_ranges: list[tuple[int, int]],
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    drift: float = 0.3,
    scale: float | None = None,
) -> Case:
    """NaN in queries not listed, keys out of range, and what only tracked or window rows have."""
    num_heads, num_kv_heads = heads
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    capacity = max([end for _, end in key_ranges] + [sum(count) for count in counts]) + 2
    num_slots = len(counts) * capacity
    kind: dict[str, Any] = {"dtype": dtype, "device": device}
    rows, segments, is_tested = _lay_rows(rng, counts, key_ranges, capacity, device)
    q, k = (normal(rng, num_slots, h, head_dim, **kind) for h in heads)
    listed = rows[rows >= 0].long()
    q_old, k_old = (poisoned(len(rows), h, head_dim, **kind) for h in heads)
    q_old[rows >= 0], k_old[rows >= 0] = q[listed], k[listed]
    q_old[~is_tested] = float("nan")
    q[listed] += drift * normal(rng, len(listed), num_heads, head_dim, **kind)
    k[listed] += drift * normal(rng, len(listed), num_kv_heads, head_dim, **kind)
    v = normal(rng, num_slots, num_kv_heads, head_dim, **kind)
    unlisted = torch.ones(num_slots, dtype=torch.bool, device=device)
    unlisted[listed] = False
    q[unlisted] = float("nan")
    for s, (first, end) in enumerate(key_ranges):
        for cache in (k, v):
            mine = cache[s * capacity : (s + 1) * capacity]
            mine[:first], mine[end:] = float("nan"), float("nan")
    return {
        "q_cache": q,
        "k_cache": k,
        "v_cache": v,
        "q_old": q_old,
        "k_old": k_old,
        "rows": rows,
        "segments": segments,
        "key_range": int32(key_ranges, device),
        "scale": scale,
        "max_tracked": sum(count[0] for count in counts) + 3,
        "out": poisoned(len(rows), num_heads, head_dim, **kind),
        "lse": poisoned(len(rows), num_heads, dtype=torch.float32, device=device),
        "mass": poisoned(len(counts), capacity, dtype=torch.float32, device=device),
        "similarity": poisoned(len(counts), dtype=torch.float64, device=device),
    }


def _lay_rows(
    rng: torch.Generator,
    counts: list[Counts],
    key_ranges: list[tuple[int, int]],
    capacity: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row list (distinct positions inside the range, padded), segments, which rows are tracked."""
    rows: list[int] = []
    segments, is_tested = [], []
    for s, (count, (first, end)) in enumerate(zip(counts, key_ranges, strict=True)):
        segments.append([len(rows), *count])
        chosen = first + torch.randperm(end - first, generator=rng)[: sum(count)]
        if len(chosen) < sum(count):
            raise AssertionError("a case needs as many keys as rows in every sequence")
        rows += (s * capacity + chosen).tolist()
        is_tested += [True] * count[0] + [False] * (sum(count) - count[0])
    padding = [-1, -1, -1]
    return (
        int32(rows + padding, device),
        int32(segments, device).view(len(counts), 5),
        torch.tensor(is_tested + [False] * len(padding), dtype=torch.bool, device=device),
    )


def check(case: Case) -> dict[str, Tensor]:
    """Results come from float32 weights; out and lse are, in every bit, those of window_attention.

    A rounding error of a score counts in its weight as often as the score is large.
    """
    q = case["q_cache"][case["rows"][case["rows"] >= 0].long()].double()  # [r, H, D]
    k = case["k_cache"].double().repeat_interleave(q.shape[1] // case["k_cache"].shape[1], 1)
    scores = case["scale"] * torch.einsum("rhd,khd->rhk", q, k)
    largest = float(scores.nan_to_num(0.0).abs().amax()) if scores.numel() else 0.0
    condition = max(1.0, largest)
    result = check_close("drift_attention", case, arithmetic=torch.float32, condition=condition)
    attention = {argument.name: case[argument.name] for argument in SCHEMAS["window_attention"]}
    for name, expected in run(ops, "window_attention", attention).items():
        assert_same_bits(f"drift_attention: {name}", result[name], expected)
    return result


@pytest.mark.parametrize("max_tracked", [0, 5, 6, 40, 1000])
def test_more_tracked_rows_than_allowed(
    device: torch.device, rng: torch.Generator, dtype: torch.dtype, max_tracked: int
) -> None:
    """The first sequence ends at 5 tracked rows, the second at 40; the third has none."""
    counts, ranges = [(5, 1, 4, 0), (35, 0, 3, 1), (0, 0, 2, 0)], [(0, 70), (3, 60), (1, 9)]
    case = {**make_case(rng, device, dtype, counts, ranges), "max_tracked": max_tracked}
    is_nan = check(case)["similarity"].isnan().tolist()
    assert is_nan == [max_tracked < 5, max_tracked < 40, max_tracked < 40]


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
