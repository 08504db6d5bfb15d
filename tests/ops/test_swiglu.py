"""swiglu: silu(gate) * up of one fused projection."""

from __future__ import annotations

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
    normal,
    poisoned,
    run,
    run_reference,
)


def make_case(
    rng: torch.Generator,
    device: torch.device,
    dtype: torch.dtype,
    num_rows: int,
    width: int = 24,
    size: float = 1.0,
) -> Case:
    return {
        "gate_up": size * normal(rng, num_rows, 2 * width, dtype=dtype, device=device),
        "out": poisoned(num_rows, width, dtype=dtype, device=device),
    }


def test_example(device: torch.device) -> None:
    gate_up = torch.tensor([[0.0, 1.0, 5.0, 2.0]], device=device)
    out = torch.empty(1, 2, device=device)
    ops.swiglu(gate_up, out)
    torch.testing.assert_close(out.cpu(), torch.tensor([[0.0, 2 * 0.7310586]]))


@pytest.mark.parametrize("num_rows", [*TILE_SIZES, 300])
def test_rows(
    device: torch.device, rng: torch.Generator, dtype: torch.dtype, num_rows: int
) -> None:
    check_close("swiglu", make_case(rng, device, dtype, num_rows))


@pytest.mark.parametrize("width", [*TILE_SIZES, 1000, 12288])
def test_widths(device: torch.device, rng: torch.Generator, dtype: torch.dtype, width: int) -> None:
    check_close("swiglu", make_case(rng, device, dtype, 3, width))


@pytest.mark.parametrize("size", [0.0, 1e-3, 30.0, 1000.0])
def test_magnitudes(
    device: torch.device, rng: torch.Generator, dtype: torch.dtype, size: float
) -> None:
    """Far out exp(-gate) overflows, and silu is the gate itself or zero."""
    check_close("swiglu", make_case(rng, device, dtype, 9, 50, size))


def test_rounds_before_the_product(device: torch.device, rng: torch.Generator) -> None:
    """Without the rounding in between the result is nearer to the truth, and not the model's.

    All but a few values, which lie on the edge between two bfloat16 numbers, have the same bits.
    """
    case = make_case(rng, device, torch.bfloat16, 20, 500)
    result, plain = run(ops, "swiglu", case), run_reference("swiglu", case)
    assert (result["out"] == plain["out"]).double().mean() > 0.995


def test_contract(device: torch.device, rng: torch.Generator, dtype: torch.dtype) -> None:
    check_contract("swiglu", make_case(rng, device, dtype, 100, 1000))


def test_rejects(device: torch.device, rng: torch.Generator) -> None:
    case = make_case(rng, device, torch.float32, 9)
    check_rejects_malformed("swiglu", case)
    for bad in (case["gate_up"][1:], case["gate_up"][:, 1:].contiguous()):
        assert_rejected("swiglu", {**case, "gate_up": bad}, "gate_up", "must be [")
