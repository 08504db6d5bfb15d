"""linear: x weight + bias, on the CPU a row the same whatever rows it is computed with."""

from __future__ import annotations

import pytest
import torch
from elastic_cache import ops
from opcase import (
    TILE_SIZES,
    Case,
    assert_rejected,
    can_be_batch_invariant,
    check_close,
    check_contract,
    check_rejects_malformed,
    linear_in_order,
    normal,
    poisoned,
    run,
)
from tolerance import assert_same_bits


def make_case(
    rng: torch.Generator,
    device: torch.device,
    dtype: torch.dtype,
    num_rows: int,
    in_features: int = 24,
    out_features: int = 40,
    has_bias: bool = False,
) -> Case:
    bias = normal(rng, out_features, dtype=dtype, device=device) if has_bias else None
    return {
        "x": normal(rng, num_rows, in_features, dtype=dtype, device=device),
        "weight": normal(rng, in_features, out_features, dtype=dtype, device=device),
        "bias": bias,
        "out": poisoned(num_rows, out_features, dtype=dtype, device=device),
        "batch_invariant": False,
    }


def test_example(device: torch.device) -> None:
    x = torch.tensor([[1.0, 2.0]], device=device)
    weight = torch.tensor([[1.0, 0.0, 3.0], [0.5, 1.0, -1.0]], device=device)
    out = torch.empty(1, 3, device=device)
    ops.linear(x, weight, torch.tensor([0.0, 0.0, 10.0], device=device), out, False)
    assert out.tolist() == [[2.0, 2.0, 11.0]]


@pytest.mark.parametrize("num_rows", [*TILE_SIZES, 5, 6, 350])
def test_rows(
    device: torch.device, rng: torch.Generator, dtype: torch.dtype, num_rows: int
) -> None:
    check_close("linear", make_case(rng, device, dtype, num_rows, 100, 48))


@pytest.mark.parametrize("out_features", [*TILE_SIZES, 1000])
@pytest.mark.parametrize("has_bias", [False, True])
def test_out_features(
    device: torch.device,
    rng: torch.Generator,
    dtype: torch.dtype,
    out_features: int,
    has_bias: bool,
) -> None:
    check_close("linear", make_case(rng, device, dtype, 7, 33, out_features, has_bias))


@pytest.mark.parametrize("in_features", [*TILE_SIZES, 255, 256, 257, 4096])
def test_in_features(
    device: torch.device, rng: torch.Generator, dtype: torch.dtype, in_features: int
) -> None:
    check_close("linear", make_case(rng, device, dtype, 9, in_features))


def test_strided_operands(device: torch.device, rng: torch.Generator, dtype: torch.dtype) -> None:
    """Rows of a wider tensor; what lies between them is poison."""
    case = make_case(rng, device, dtype, 13, 40, 24)
    for name in ("x", "weight"):
        rows, width = case[name].shape
        wide = poisoned(rows, width + 5, dtype=dtype, device=device)
        wide[:, :width] = case[name]
        case[name] = wide[:, :width]
    check_close("linear", case)


def test_a_row_does_not_depend_on_the_others(rng: torch.Generator, dtype: torch.dtype) -> None:
    """On the CPU; a GPU's product is the vendor's, whose kernel depends on the number of rows."""
    device = torch.device("cpu")
    case = make_case(rng, device, dtype, 23, 300, 56)
    together = run(ops, "linear", case)["out"]
    for row in range(23):
        alone = {**case, "x": case["x"][row : row + 1], "out": case["out"][:1]}
        assert_same_bits("linear: out", run(ops, "linear", alone)["out"][0], together[row])


@pytest.mark.parametrize("sizes", [(192, 6400), (448, 832), (64, 64)], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_batch_invariant(
    device: torch.device,
    rng: torch.Generator,
    dtype: torch.dtype,
    sizes: tuple[int, int],
    has_bias: bool,
) -> None:
    """Every bit of a row, wherever it stands and whatever is beside it."""
    case = {**make_case(rng, device, dtype, 400, *sizes, has_bias), "batch_invariant": True}
    if not can_be_batch_invariant(device, dtype):
        assert_rejected("linear", case, "batch_invariant")
        return
    together = check_close("linear", case)["out"]
    for begin, end in ((0, 1), (5, 21), (17, 80), (100, 350), (3, 260), (200, 400)):
        part = {**case, "x": case["x"][begin:end], "out": case["out"][begin:end]}
        rows = f"linear: rows {begin} to {end}"
        assert_same_bits(rows, run(ops, "linear", part)["out"], together[begin:end])


def test_the_plainest_order_of_a_sum(device: torch.device, dtype: torch.dtype) -> None:
    """What the vendor's sums are held against: 1 + 2^30 is rounded before 2^30 is taken off."""
    x = torch.tensor([[2.0**30, -(2.0**30), 3.0]], dtype=dtype, device=device)
    bias = torch.ones(1, dtype=dtype, device=device)
    out = torch.empty(1, 1, dtype=dtype, device=device)
    linear_in_order(x, torch.ones(3, 1, dtype=dtype, device=device), bias, out, False)
    assert out.item() == 3.0
    wide = torch.empty(1, 1, dtype=torch.float64, device=device)
    linear_in_order(x.double(), torch.ones_like(x.double()).t(), bias.double(), wide, False)
    assert wide.item() == 4.0


def test_contract(device: torch.device, rng: torch.Generator, dtype: torch.dtype) -> None:
    check_contract("linear", make_case(rng, device, dtype, 60, 128, 200, has_bias=True))


def test_rejects(device: torch.device, rng: torch.Generator) -> None:
    case = make_case(rng, device, torch.float32, 9, has_bias=True)
    check_rejects_malformed("linear", case)
    for name, bad in (
        ("weight", case["weight"][1:]),
        ("bias", case["bias"][1:]),
        ("out", case["out"][1:]),
    ):
        assert_rejected("linear", {**case, name: bad}, name, "must be [")
    if device.type == "cuda":
        narrow = {**make_case(rng, device, torch.bfloat16, 9, 64, 96), "batch_invariant": True}
        assert_rejected("linear", narrow, "batch_invariant", "[64, 96]")


def test_weight_stored_out_by_in(
    device: torch.device, rng: torch.Generator, dtype: torch.dtype
) -> None:
    """A GPU's weights lie so; the CPU's kernel does not read them."""
    case = make_case(rng, device, dtype, 17, 40, 24)
    case["weight"] = case["weight"].t().contiguous().t()
    if device.type == "cpu":
        assert_rejected("linear", case, "weight", "have contiguous rows")
    else:
        check_close("linear", case)
