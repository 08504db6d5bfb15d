"""project_qkv: the bits of add_rms_norm, linear and cache_write called one after the other."""

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
    int32,
    normal,
    poisoned,
    random_slots,
    run,
    spread_rows,
    threads,
)
from tolerance import assert_same_bits


def make_case(
    rng: torch.Generator,
    device: torch.device,
    dtype: torch.dtype,
    num_rows: int,
    width: int = 24,
    heads: tuple[int, int] = (3, 1),
    head_dim: int = 6,
) -> Case:
    kind: dict[str, Any] = {"dtype": dtype, "device": device}
    capacity = num_rows + 2
    q, kv = ((2 * capacity, count, head_dim) for count in heads)
    columns = (heads[0] + 2 * heads[1]) * head_dim
    angle = 6.3 * torch.rand(capacity + 3, head_dim // 2, generator=rng)
    return {
        "residual": normal(rng, num_rows, width, **kind),
        "delta": normal(rng, num_rows, width, **kind),
        "norm_weight": 1 + 0.2 * normal(rng, width, **kind),
        "eps": 1e-5,
        "weight": normal(rng, width, columns, **kind) / width**0.5,
        "bias": normal(rng, columns, **kind),
        "rows": random_slots(rng, num_rows, 2 * capacity, device),
        "rope": torch.cat((angle.cos(), angle.sin()), -1).to(device),
        "capacity": capacity,
        "segments": int32(
            [[0, num_rows // 3, 0, 0, 0], [num_rows // 2, 2 * num_rows // 5, 0, 0, 0]], device
        ),
        "x_cache": normal(rng, 2 * capacity, width, **kind),
        "q_cache": normal(rng, *q, **kind),
        "k_cache": normal(rng, *kv, **kind),
        "v_cache": normal(rng, *kv, **kind),
        "q_old": poisoned(num_rows, *q[1:], **kind),
        "k_old": poisoned(num_rows, *kv[1:], **kind),
        "hidden": poisoned(num_rows, width, **kind),
        "qkv": poisoned(num_rows, columns, **kind),
        "batch_invariant": False,
    }


class Composition:
    """The op as its parts."""

    @staticmethod
    def project_qkv(*args: Any) -> None:
        residual, delta, norm_weight, eps, weight, bias, rows, rope, capacity, segments = args[:10]
        x_cache, *caches, hidden, qkv, batch_invariant = args[10:]
        stored = None if x_cache is None else rows
        ops.add_rms_norm(residual, delta, norm_weight, eps, hidden, stored, x_cache)
        ops.linear(hidden, weight, bias, qkv, batch_invariant)
        ops.cache_write(qkv, rows, rope, capacity, segments, *caches)


def check_parts(case: Case) -> None:
    expected = run(Composition, "project_qkv", case)
    for count in (1, 2):
        with threads(count):
            for name, value in run(ops, "project_qkv", case).items():
                assert_same_bits(f"project_qkv: {name}, {count} threads", value, expected[name])


@pytest.mark.parametrize("num_rows", [*TILE_SIZES, 22, 30, 31, 350])
def test_rows(
    device: torch.device, rng: torch.Generator, dtype: torch.dtype, num_rows: int
) -> None:
    case = make_case(rng, device, dtype, num_rows, 48)
    check_parts(case)
    check_close("project_qkv", case, exact=("residual", "x_cache", "q_old", "k_old"))


@pytest.mark.parametrize("num_rows", [1, 16, 30, 48, 65, 81, 113, 128, 129, 161, 192])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("heads", [(34, 17), (2, 1)], ids=str)
def test_streamed_weights(
    device: torch.device,
    rng: torch.Generator,
    dtype: torch.dtype,
    heads: tuple[int, int],
    has_bias: bool,
    num_rows: int,
) -> None:
    """Sizes that a GPU of compute capability 9.0 multiplies by streaming bfloat16 weights."""
    case = make_case(rng, device, dtype, num_rows, 192, heads, 128)
    if not has_bias:
        case["bias"] = None
    check_close("project_qkv", case, exact=("residual", "x_cache", "q_old", "k_old"))


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (4, 4), (5, 5)], ids=str)
@pytest.mark.parametrize("width", [1, 7, 255, 300])
def test_widths(
    device: torch.device,
    rng: torch.Generator,
    dtype: torch.dtype,
    heads: tuple[int, int],
    width: int,
) -> None:
    check_parts(make_case(rng, device, dtype, 17, width, heads, 10))


@pytest.mark.parametrize("absent", ["delta", "bias", "segments", "x_cache", "q_old", "k_old"])
def test_optional_arguments(
    device: torch.device, rng: torch.Generator, dtype: torch.dtype, absent: str
) -> None:
    check_parts({**make_case(rng, device, dtype, 19), absent: None})


def test_batch_invariant(device: torch.device, rng: torch.Generator, dtype: torch.dtype) -> None:
    """More rows than torch's product would be left to otherwise."""
    case = {**make_case(rng, device, dtype, 300, 192, (34, 17), 128), "batch_invariant": True}
    if not can_be_batch_invariant(device, dtype):
        assert_rejected("project_qkv", case, "batch_invariant")
        return
    names = ("residual", "delta", "rows", "q_old", "k_old", "hidden", "qkv")
    together = run(ops, "project_qkv", case)
    few = {name: case[name][250:280] for name in names}
    for name, value in run(ops, "project_qkv", {**case, **few, "segments": None}).items():
        if name in ("hidden", "qkv"):
            assert_same_bits(f"project_qkv: {name} of few", value, together[name][250:280])


def test_strided_weight(device: torch.device, rng: torch.Generator, dtype: torch.dtype) -> None:
    case = make_case(rng, device, dtype, 19)
    check_parts({**case, "weight": spread_rows(case["weight"])})


def test_a_row_does_not_depend_on_the_others(rng: torch.Generator, dtype: torch.dtype) -> None:
    """On the CPU; a GPU's product is the vendor's, whose kernel depends on the number of rows."""
    device = torch.device("cpu")
    case = {**make_case(rng, device, dtype, 23, 128, (4, 4), 32), "segments": None}
    together = run(ops, "project_qkv", case)
    per_row = ("residual", "delta", "rows", "q_old", "k_old", "hidden", "qkv")
    for row in range(23):
        alone = {**case, **{name: case[name][row : row + 1] for name in per_row}}
        result, slot = run(ops, "project_qkv", alone), int(case["rows"][row])
        for name in ("residual", "q_old", "k_old", "hidden", "qkv"):
            assert_same_bits(name, result[name][0], together[name][row])
        for name in ("x_cache", "q_cache", "k_cache", "v_cache"):
            if slot >= 0:
                assert_same_bits(name, result[name][slot], together[name][slot])


def test_all_rows_skipped(device: torch.device, rng: torch.Generator, dtype: torch.dtype) -> None:
    case = make_case(rng, device, dtype, 9)
    case["rows"].fill_(-1)
    case["segments"] = None
    result = run(ops, "project_qkv", case)
    for name in ("x_cache", "q_cache", "k_cache", "v_cache"):
        assert_same_bits(name, result[name], case[name])
    assert not result["q_old"].any() and not result["k_old"].any()


def test_contract(device: torch.device, rng: torch.Generator, dtype: torch.dtype) -> None:
    check_contract("project_qkv", make_case(rng, device, dtype, 60, 128, (4, 4), 32))


def test_rejects(device: torch.device, rng: torch.Generator) -> None:
    case = make_case(rng, device, torch.float32, 9)
    check_rejects_malformed("project_qkv", case)
    short = ("delta", "norm_weight", "weight", "bias", "rows", "x_cache", "k_cache", "v_cache")
    for name in (*short, "q_old", "k_old", "hidden", "qkv"):
        assert_rejected("project_qkv", {**case, name: case[name][1:]}, name, "must be [")
    assert_rejected("project_qkv", {**case, "capacity": 0}, "capacity", "got 0")
    assert_rejected("project_qkv", {**case, "rope": case["rope"][:1]}, "rope", "got 1")


def test_rejects_slots_outside(rng: torch.Generator) -> None:
    case = make_case(rng, torch.device("cpu"), torch.float32, 9)
    for slot in (len(case["q_cache"]), -2):
        case["rows"][4] = slot
        assert_rejected("project_qkv", case, "rows", str(slot))
