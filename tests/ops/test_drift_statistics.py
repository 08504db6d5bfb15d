"""drift_statistics: the mass of every key and the cosine over heads, of several layers at once."""

from __future__ import annotations

import math

import pytest
import torch
from driftcase import Counts, condition_of, make_case
from elastic_cache import ops, reference
from opcase import (
    TILE_SIZES,
    Case,
    assert_rejected,
    check_close,
    check_contract,
    check_rejects_malformed,
    int32,
    poisoned,
    run,
)
from tolerance import assert_same_bits
from torch import Tensor


def make_layers(
    rng: torch.Generator,
    device: torch.device,
    dtype: torch.dtype,
    counts: list[Counts],
    key_ranges: list[tuple[int, int]],
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    num_layers: int = 3,
    more_rows: int = 2,
) -> Case:
    """Layers unlike each other on the same rows; `more_rows` of what has rows belong to none."""
    case = make_case(rng, device, dtype, counts, key_ranges, heads, head_dim)

    def stack(name: str) -> Tensor:
        layers = [(1 + i / 4) * case[name].roll(i, 1) for i in range(num_layers)]
        return torch.stack(layers) if layers else case[name][None][:0]

    def old(name: str) -> Tensor:
        more = poisoned(more_rows, *case[name].shape[1:], dtype=dtype, device=device)
        return torch.cat((stack(name), more.expand(num_layers, *more.shape)), 1)

    shape = (num_layers, *case["mass"].shape)
    q_old = old("q_old")
    lse = poisoned(*q_old.shape[:3], dtype=torch.float32, device=device)
    stacked = {
        "q_cache": stack("q_cache"),
        "k_cache": stack("k_cache"),
        "q_old": q_old,
        "k_old": old("k_old"),
        "lse": lse,
        **{name: case[name] for name in ("rows", "segments", "key_range", "scale")},
        "mass": poisoned(*shape, dtype=torch.float32, device=device),
        "similarity": poisoned(*shape[:2], dtype=torch.float64, device=device),
    }
    write_log_sums(stacked)
    return stacked


def write_log_sums(case: Case) -> None:
    """Writes lse: what window_attention gives the rows. Skipped rows keep what is there."""
    rows, keys = case["rows"], case["k_cache"].double()
    listed = rows >= 0
    for layer, lse in enumerate(case["lse"]):
        found = torch.empty(len(rows), lse.shape[1], dtype=torch.float64, device=lse.device)
        reference.window_attention(
            case["q_cache"][layer].double(), keys[layer], keys[layer].nan_to_num(), rows,
            None, case["key_range"], case["scale"],
            case["q_old"][layer, : len(rows)].double(), found,
        )  # fmt: skip
        lse[: len(rows)][listed] = found[listed].float()


def check(case: Case) -> dict[str, Tensor]:
    """Results come from float32 weights, with and without given log-sum-exps."""
    precision = {"arithmetic": torch.float32, "condition": condition_of(case)}
    check_close("drift_statistics", {**case, "lse": None}, **precision)
    return check_close("drift_statistics", case, **precision)


@pytest.mark.parametrize("num_layers", [0, 1, 2, 5])
def test_layers(
    device: torch.device, rng: torch.Generator, dtype: torch.dtype, num_layers: int
) -> None:
    """A layer's results are those it has by itself, in every bit."""
    counts, ranges = [(3, 1, 6, 2), (0, 2, 3, 0), (2, 0, 4, 0)], [(0, 70), (1, 9), (5, 80)]
    case = make_layers(rng, device, dtype, counts, ranges, num_layers=num_layers)
    result = check(case)
    for layer in range(num_layers):
        names = ("q_cache", "k_cache", "q_old", "k_old", "lse", "mass", "similarity")
        own = {**case, **{name: case[name][layer : layer + 1] for name in names}}
        for name, value in run(ops, "drift_statistics", own).items():
            assert_same_bits(f"layer {layer}: {name}", value[0], result[name][layer])


@pytest.mark.parametrize("size", TILE_SIZES)
def test_window_rows(
    device: torch.device, rng: torch.Generator, dtype: torch.dtype, size: int
) -> None:
    check(make_layers(rng, device, dtype, [(2, 3, size, 2), (1, 0, 4, 0)], [(0, 80), (2, 30)]))


@pytest.mark.parametrize("size", TILE_SIZES)
def test_tracked_rows(
    device: torch.device, rng: torch.Generator, dtype: torch.dtype, size: int
) -> None:
    check(make_layers(rng, device, dtype, [(size, 3, 5, 2), (1, 0, 4, 0)], [(0, 80), (2, 30)]))


@pytest.mark.parametrize("num_keys", [*TILE_SIZES[4:], 127, 128, 129, 1500])
def test_keys(
    device: torch.device, rng: torch.Generator, dtype: torch.dtype, num_keys: int
) -> None:
    ranges = [(0, num_keys), (3, 3 + num_keys)]
    check(make_layers(rng, device, dtype, [(2, 1, 4, 1), (1, 2, 3, 0)], ranges))


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2), (8, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [2, 6, 32, 64, 128])
def test_heads(
    device: torch.device,
    rng: torch.Generator,
    dtype: torch.dtype,
    heads: tuple[int, int],
    head_dim: int,
) -> None:
    counts, ranges = [(2, 3, 9, 2), (0, 0, 7, 0), (1, 0, 0, 0)], [(0, 65), (0, 9), (7, 40)]
    check(make_layers(rng, device, dtype, counts, ranges, heads, head_dim, num_layers=2))


@pytest.mark.parametrize("head_dim", [6, 64])
def test_whole_tiles_are_overwritten(
    device: torch.device, rng: torch.Generator, dtype: torch.dtype, head_dim: int
) -> None:
    """As many rows as keys, so that no key is as it was; and more than one tile of each kind."""
    counts, ranges = [(40, 20, 80, 10), (70, 0, 20, 0)], [(0, 150), (9, 130)]
    check(make_layers(rng, device, dtype, counts, ranges, head_dim=head_dim, num_layers=2))


def test_nothing_tracked(device: torch.device, rng: torch.Generator, dtype: torch.dtype) -> None:
    """Without tracked rows there is no drift, and what was overwritten need not be given."""
    case = make_layers(rng, device, dtype, [(0, 2, 8, 0), (0, 0, 3, 1)], [(0, 33), (2, 17)])
    assert (check(case)["similarity"] == math.inf).all()
    check({**case, "q_old": None, "k_old": None})


def test_skipped_rows(device: torch.device, rng: torch.Generator, dtype: torch.dtype) -> None:
    """-1 inside a segment, with NaN in all that belongs to the row."""
    case = make_layers(rng, device, dtype, [(4, 2, 9, 2), (1, 0, 4, 0)], [(0, 80), (2, 30)])
    for row in (1, 7, 9, 17):  # tracked; window; window; the only tracked row of sequence 1
        skipped = int(case["rows"][row])
        case["k_cache"][:, skipped] = case["k_old"][:, row]  # never written
        for name in ("q_old", "k_old"):
            case[name][:, row] = float("nan")
        case["q_cache"][:, skipped] = float("nan")
        case["lse"][:, row] = float("nan")
        case["rows"][row] = -1
    write_log_sums(case)
    assert (check(case)["similarity"][:, 1] == math.inf).all()


def test_no_row_and_no_key(device: torch.device, rng: torch.Generator, dtype: torch.dtype) -> None:
    counts, ranges = [(0, 0, 0, 0), (0, 0, 0, 0)], [(0, 9), (4, 4)]
    result = check(make_layers(rng, device, dtype, counts, ranges))
    assert not result["mass"].any()
    assert (result["similarity"] == math.inf).all()


def test_contract(device: torch.device, rng: torch.Generator, dtype: torch.dtype) -> None:
    counts, ranges = [(6, 4, 16, 2), (3, 3, 20, 0)], [(0, 400), (11, 333)]
    check_contract("drift_statistics", make_layers(rng, device, dtype, counts, ranges, (4, 2), 64))


def test_rejects(device: torch.device, rng: torch.Generator) -> None:
    counts, ranges = [(2, 1, 4, 1), (1, 2, 3, 0)], [(0, 20), (3, 23)]
    case = make_layers(rng, device, torch.float32, counts, ranges)
    check_rejects_malformed("drift_statistics", case)
    for name, bad in {
        "k_cache": case["k_cache"][:, 1:].contiguous(),
        "q_old": case["q_old"][1:],
        "k_old": case["k_old"][:, 1:].contiguous(),
        "lse": case["lse"][:, 1:].contiguous(),
        "segments": case["segments"][:, 1:].contiguous(),
        "key_range": case["key_range"][1:],
        "mass": case["mass"][1:],
        "similarity": case["similarity"][:, 1:].contiguous(),
    }.items():
        assert_rejected("drift_statistics", {**case, name: bad}, name, "must be [")
    few = {name: case[name][:, :3].contiguous() for name in ("q_old", "k_old", "lse")}
    assert_rejected("drift_statistics", {**case, **few}, "q_old", "must have a row for each of")
    alone = {"q_old": None, "k_old": None, "lse": few["lse"]}
    assert_rejected("drift_statistics", {**case, **alone}, "lse", "must have a row for each of")


def test_rejects_values(rng: torch.Generator) -> None:
    device = torch.device("cpu")
    counts, ranges = [(2, 1, 4, 1), (1, 2, 3, 0)], [(0, 20), (3, 23)]
    case = make_layers(rng, device, torch.float32, counts, ranges)
    no_old = {**case, "q_old": None, "k_old": None}
    assert_rejected("drift_statistics", no_old, "q_old", "tracked")
    segments = case["segments"].clone()
    segments[1] = int32([8, 1, 2, 30, 0], device)
    assert_rejected("drift_statistics", {**case, "segments": segments}, "segments", "got")
    bad_range = int32([[0, 20], [3, 99]], device)
    assert_rejected("drift_statistics", {**case, "key_range": bad_range}, "key_range", "got")
    case["rows"][4] = case["q_cache"].shape[1]
    assert_rejected("drift_statistics", case, "rows", str(case["q_cache"].shape[1]))
