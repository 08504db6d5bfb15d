"""output_mlp: the bits of linear, add_rms_norm, linear, swiglu and linear one after the other."""

from __future__ import annotations

from typing import Any

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
    normal,
    poisoned,
    run,
    spread_rows,
    threads,
)
from tolerance import assert_same_bits
from torch import Tensor

PER_ROW = ("residual", "hidden", "gate_up", "activation", "delta")


def make_case(
    rng: torch.Generator,
    device: torch.device,
    dtype: torch.dtype,
    num_rows: int,
    width: int = 24,
    attention_width: int = 20,
    ffn_width: int = 40,
) -> Case:
    kind: dict[str, Any] = {"dtype": dtype, "device": device}

    def matrix(rows: int, columns: int) -> Tensor:
        return normal(rng, rows, columns, **kind) / rows**0.5

    return {
        "attention": normal(rng, num_rows, attention_width, **kind),
        "out_weight": matrix(attention_width, width),
        "residual": normal(rng, num_rows, width, **kind),
        "norm_weight": 1 + 0.2 * normal(rng, width, **kind),
        "eps": 1e-5,
        "gate_up_weight": matrix(width, 2 * ffn_width),
        "down_weight": matrix(ffn_width, width),
        "hidden": poisoned(num_rows, width, **kind),
        "gate_up": poisoned(num_rows, 2 * ffn_width, **kind),
        "activation": poisoned(num_rows, ffn_width, **kind),
        "delta": poisoned(num_rows, width, **kind),
        "batch_invariant": False,
    }


class Composition:
    """The op as its parts."""

    @staticmethod
    def output_mlp(*args: Any) -> None:
        attention, out_weight, residual, norm_weight, eps, gate_up_weight, down_weight = args[:7]
        hidden, gate_up, activation, delta, batch_invariant = args[7:]
        ops.linear(attention, out_weight, None, delta, batch_invariant)
        ops.add_rms_norm(residual, delta, norm_weight, eps, hidden, None, None)
        ops.linear(hidden, gate_up_weight, None, gate_up, batch_invariant)
        ops.swiglu(gate_up, activation)
        ops.linear(activation, down_weight, None, delta, batch_invariant)


def check_parts(case: Case) -> None:
    expected = run(Composition, "output_mlp", case)
    for count in (1, 2):
        with threads(count):
            for name, value in run(ops, "output_mlp", case).items():
                assert_same_bits(f"output_mlp: {name}, {count} threads", value, expected[name])


@pytest.mark.parametrize("num_rows", [*TILE_SIZES, 22, 30, 31, 350])
def test_rows(
    device: torch.device, rng: torch.Generator, dtype: torch.dtype, num_rows: int
) -> None:
    case = make_case(rng, device, dtype, num_rows, 48, 32, 80)
    check_parts(case)
    check_close("output_mlp", case)


@pytest.mark.parametrize(
    "num_rows", [1, 16, 17, 33, 48, 64, 65, 81, 97, 113, 128, 150, 161, 192, 193, 256, 257]
)
def test_streamed_weights(
    device: torch.device, rng: torch.Generator, dtype: torch.dtype, num_rows: int
) -> None:
    """Sizes that a GPU of compute capability 9.0 multiplies by streaming bfloat16 weights.

    Up to 192 rows; a row's result is then the same with any number of others. From 49 to 256 rows
    gate_up is left as it is.
    """
    case = make_case(rng, device, dtype, num_rows, 192, 256, 6400)
    may_stream = device.type == "cuda" and dtype == torch.bfloat16
    scratch = ("gate_up",) if may_stream and 48 < num_rows <= 256 else ()
    result = check_close("output_mlp", case, scratch=scratch)
    if may_stream and num_rows <= 192:
        few = {name: case[name][:1].clone() for name in ("attention", *PER_ROW)}
        for name, value in run(ops, "output_mlp", {**case, **few}).items():
            if name not in scratch:
                assert_same_bits(f"output_mlp: {name} alone", value[0], result[name][0])


def test_batch_invariant(device: torch.device, rng: torch.Generator, dtype: torch.dtype) -> None:
    """More rows than torch's products would be left to otherwise, and few of them."""
    case = {**make_case(rng, device, dtype, 400, 192, 256, 6400), "batch_invariant": True}
    if not can_be_batch_invariant(device, dtype):
        assert_rejected("output_mlp", case, "batch_invariant")
        return
    together = check_close("output_mlp", case, scratch=("gate_up",))
    for begin, end in ((0, 16), (7, 40), (100, 350), (190, 400)):
        part = {name: case[name][begin:end].clone() for name in ("attention", *PER_ROW)}
        for name, value in run(ops, "output_mlp", {**case, **part}).items():
            if name != "gate_up":
                rows = f"output_mlp: {name}, rows {begin} to {end}"
                assert_same_bits(rows, value, together[name][begin:end])


@pytest.mark.parametrize("width", [1, 17, 128])
@pytest.mark.parametrize("attention_width", [3, 300])
@pytest.mark.parametrize("ffn_width", [1, 16, 33, 380])
def test_widths(
    device: torch.device,
    rng: torch.Generator,
    dtype: torch.dtype,
    width: int,
    attention_width: int,
    ffn_width: int,
) -> None:
    check_parts(make_case(rng, device, dtype, 17, width, attention_width, ffn_width))


def test_strided_weights(device: torch.device, rng: torch.Generator, dtype: torch.dtype) -> None:
    case = make_case(rng, device, dtype, 19)
    for name in ("out_weight", "gate_up_weight", "down_weight"):
        case[name] = spread_rows(case[name])
    check_parts(case)


def test_a_row_does_not_depend_on_the_others(rng: torch.Generator, dtype: torch.dtype) -> None:
    """On the CPU; a GPU's product is the vendor's, whose kernel depends on the number of rows."""
    device = torch.device("cpu")
    case = make_case(rng, device, dtype, 23, 128, 128, 200)
    together = run(ops, "output_mlp", case)
    for row in range(23):
        cut = {name: case[name][row : row + 1] for name in ("attention", *PER_ROW)}
        alone = run(ops, "output_mlp", {**case, **cut})
        for name in PER_ROW:
            assert_same_bits(name, alone[name][0], together[name][row])


def test_contract(device: torch.device, rng: torch.Generator, dtype: torch.dtype) -> None:
    check_contract("output_mlp", make_case(rng, device, dtype, 60, 128, 128, 384))


def test_rejects(device: torch.device, rng: torch.Generator) -> None:
    case = make_case(rng, device, torch.float32, 9)
    check_rejects_malformed("output_mlp", case)
    for name, value in case.items():
        if isinstance(value, Tensor) and name not in ("residual", "attention", "activation"):
            assert_rejected("output_mlp", {**case, name: value[1:]}, name, "must be [")
    assert_rejected("output_mlp", {**case, "attention": case["attention"][1:]}, "attention")
    assert_rejected("output_mlp", {**case, "activation": case["activation"][1:]}, "activation")
