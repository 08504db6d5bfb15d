"""token_confidence: argmax of a row of logits (exact) and its probability."""

from __future__ import annotations

import math

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
    spread_rows,
)
from torch import Tensor

SPECIAL = {"nan": math.nan, "+inf": math.inf, "-inf": -math.inf}


def make_case(
    rng: torch.Generator,
    device: torch.device,
    dtype: torch.dtype,
    num_rows: int,
    vocab_size: int = 100,
    has_noise: bool = False,
    size: float = 3.0,
) -> Case:
    logits = size * normal(rng, num_rows, vocab_size, dtype=dtype, device=device)
    noise = normal(rng, num_rows, vocab_size, dtype=torch.float64, device=device)
    return {
        "logits": spread_rows(logits),
        "noise": noise if has_noise else None,
        "token": poisoned(num_rows, dtype=torch.int64, device=device),
        "confidence": poisoned(num_rows, dtype=torch.float64, device=device),
    }


def check(case: Case) -> dict[str, Tensor]:
    """Terms of the sum may be float32, whatever the sum is."""
    return check_close("token_confidence", case, arithmetic=torch.float32)


def test_example(device: torch.device) -> None:
    """Noise moves the choice, never the confidence; ties go to the lowest id."""
    logits = torch.tensor([[0.0, 0.0, -math.inf], [math.log(3), 0.0, -math.inf]], device=device)
    noise = torch.tensor([[0.0, 0.0, 0.0], [0.0, 2.0, 0.0]], dtype=torch.float64, device=device)
    token = poisoned(2, dtype=torch.int64, device=device)
    confidence = poisoned(2, dtype=torch.float64, device=device)
    ops.token_confidence(logits, noise, token, confidence)
    assert token.tolist() == [0, 1]
    expected = torch.tensor([0.5, 0.25], dtype=torch.float64)
    torch.testing.assert_close(confidence.cpu(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_rows", [*TILE_SIZES, 200])
@pytest.mark.parametrize("has_noise", [False, True])
def test_rows(
    device: torch.device, rng: torch.Generator, dtype: torch.dtype, num_rows: int, has_noise: bool
) -> None:
    check(make_case(rng, device, dtype, num_rows, has_noise=has_noise))


@pytest.mark.parametrize("vocab_size", [*TILE_SIZES[1:], 1000, 126464])
@pytest.mark.parametrize("has_noise", [False, True])
def test_vocabularies(
    device: torch.device,
    rng: torch.Generator,
    dtype: torch.dtype,
    vocab_size: int,
    has_noise: bool,
) -> None:
    check(make_case(rng, device, dtype, 3, vocab_size, has_noise))


@pytest.mark.parametrize("size", [0.0, 1e-3, 300.0])
def test_magnitudes(
    device: torch.device, rng: torch.Generator, dtype: torch.dtype, size: float
) -> None:
    """Equal logits tie everywhere; at 300 exp of a raw logit would overflow."""
    check(make_case(rng, device, dtype, 9, 500, size=size))


@pytest.mark.parametrize("vocab_size", [9, 64, 1001])
def test_ties_go_to_the_lowest_id(
    device: torch.device, rng: torch.Generator, dtype: torch.dtype, vocab_size: int
) -> None:
    case = make_case(rng, device, dtype, 20, vocab_size)
    case["logits"].copy_(torch.randint(-3, 3, case["logits"].shape, generator=rng))
    check(case)


@pytest.mark.parametrize("special", list(SPECIAL))
@pytest.mark.parametrize("column", [0, 6, 49])
@pytest.mark.parametrize("has_noise", [False, True])
def test_special_logits(
    device: torch.device,
    rng: torch.Generator,
    dtype: torch.dtype,
    special: str,
    column: int,
    has_noise: bool,
) -> None:
    """NaN and +inf spoil their row alone; -inf is a token that is never chosen."""
    case = make_case(rng, device, dtype, 4, 50, has_noise)
    case["logits"][2, column] = SPECIAL[special]
    result = check(case)
    is_spoilt = special != "-inf"
    assert result["confidence"].isnan().tolist() == [False, False, is_spoilt, False]
    assert not is_spoilt or result["token"][2] == 0


def test_no_possible_token(device: torch.device, rng: torch.Generator, dtype: torch.dtype) -> None:
    """A row of -inf has no distribution: NaN, so that nothing is committed."""
    case = make_case(rng, device, dtype, 3, 20)
    case["logits"][1] = -math.inf
    assert run(ops, "token_confidence", case)["confidence"].isnan().tolist() == [False, True, False]


def test_one_possible_token(device: torch.device, rng: torch.Generator, dtype: torch.dtype) -> None:
    case = make_case(rng, device, dtype, 3, 20)
    case["logits"].fill_(-math.inf)
    case["logits"][:, 7] = -5.0
    result = check(case)
    assert result["token"].tolist() == [7, 7, 7] and result["confidence"].tolist() == [1, 1, 1]


def test_contract(device: torch.device, rng: torch.Generator, dtype: torch.dtype) -> None:
    check_contract("token_confidence", make_case(rng, device, dtype, 40, 3000, has_noise=True))


def test_rejects(device: torch.device, rng: torch.Generator) -> None:
    case = make_case(rng, device, torch.float32, 9, has_noise=True)
    check_rejects_malformed("token_confidence", case)
    for name, bad in {
        "noise": case["noise"][1:],
        "token": case["token"][1:],
        "confidence": case["confidence"][1:],
    }.items():
        assert_rejected("token_confidence", {**case, name: bad}, name, "must be [")
    empty = make_case(rng, device, torch.float32, 9, vocab_size=0)
    assert_rejected("token_confidence", empty, "logits", "got 0")
