"""commit: candidates by confidence, the EOS rule and the report to the host; all of it exact."""

from __future__ import annotations

import math

import pytest
import torch
from elastic_cache.reference import FACTOR, THRESHOLD, TOP_K
from hypothesis import given, settings
from hypothesis import strategies as st
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
from torch import Tensor

CPU = torch.device("cpu")
EOS, MASK = 2, 9


def make_case(
    rng: torch.Generator,
    device: torch.device,
    num_candidates: int,
    rules: list[tuple[int, float]],
    eos_id: int = EOS,
    levels: int = 1000,
) -> Case:
    """Confidences in `levels` steps (few make ties); candidates out of order, some not masked."""
    num_sequences = len(rules)
    capacity = num_candidates + 4
    masked = torch.rand(num_sequences, capacity, generator=rng) < 0.8
    masked[:, 0] = masked[:, -1] = True  # outside of the key range: never touched
    tokens = torch.where(masked, MASK, torch.randint(10, 99, masked.shape, generator=rng))
    candidates = torch.randperm(num_sequences * capacity, generator=rng)[:num_candidates].int()
    candidates[torch.rand(len(candidates), generator=rng) < 0.1] = -1
    confidence = torch.randint(1, levels + 1, (len(candidates),), generator=rng).double() / levels
    confidence[candidates < 0] = float("nan")
    token = torch.randint(0, 40, (len(candidates),), generator=rng)
    amount = torch.tensor([amount for _, amount in rules], dtype=torch.float64)
    return {
        "token": token.to(device),
        "confidence": confidence.to(device),
        "candidates": candidates.to(device),
        "rule": int32([rule for rule, _ in rules], device),
        "amount": amount.to(device),
        "key_range": int32([[1, capacity - 1]] * num_sequences, device).view(num_sequences, 2),
        "eos_id": eos_id,
        "first_full_layer": None,
        "num_layers": 4,
        "tokens": tokens.to(device),
        "masked": masked.to(device),
        "committed": poisoned(num_sequences, capacity, dtype=torch.bool, device=device),
        "eos_position": int32([-1] * num_sequences, device),
        "status": poisoned(num_sequences, 4, dtype=torch.int32, device=device),
    }


def one_sequence(
    device: torch.device, tokens: list[int], confidence: list[float], rule: int, amount: float
) -> Case:
    """Every position of one sequence is masked and a candidate, listed from right to left."""
    count = len(tokens)
    return {
        "token": torch.tensor(tokens[::-1], device=device),
        "confidence": torch.tensor(confidence[::-1], dtype=torch.float64, device=device),
        "candidates": int32(list(range(count))[::-1], device),
        "rule": int32([rule], device),
        "amount": torch.tensor([amount], dtype=torch.float64, device=device),
        "key_range": int32([[0, count]], device),
        "eos_id": EOS,
        "first_full_layer": None,
        "num_layers": 4,
        "tokens": torch.full((1, count), MASK, device=device),
        "masked": torch.ones(1, count, dtype=torch.bool, device=device),
        "committed": poisoned(1, count, dtype=torch.bool, device=device),
        "eos_position": int32([-1], device),
        "status": poisoned(1, 4, dtype=torch.int32, device=device),
    }


def committed_by(result: dict[str, Tensor]) -> list[int]:
    positions: list[int] = result["committed"][0].nonzero().flatten().tolist()
    return positions


@pytest.mark.parametrize(
    ("rule", "amount", "expected"),
    [
        (THRESHOLD, 0.9, [0, 3]),  # 0.9 itself is enough
        (THRESHOLD, 0.99, [0]),  # nobody reaches it: the best alone
        (THRESHOLD, 0.0, [0, 1, 2, 3, 4]),
        (TOP_K, 3, [0, 1, 3]),  # 1 and 2 tie: the lower position
        (TOP_K, 0, [0]),
        (TOP_K, 99, [0, 1, 2, 3, 4]),
        (FACTOR, 0.0, [0]),
        (FACTOR, 0.3, [0, 3]),  # r = 2: 0.9 >= 1 - 0.3 / 3
        (FACTOR, 1.0, [0, 3]),  # r = 3: 0.5 < 1 - 1 / 4
        (FACTOR, 2.0, [0, 1, 3]),  # r = 3: 0.5 >= 1 - 2 / 4, r = 4: 0.5 < 1 - 2 / 5
    ],
)
def test_rules(device: torch.device, rule: int, amount: float, expected: list[int]) -> None:
    confidence = [0.95, 0.5, 0.5, 0.9, 0.1]
    case = one_sequence(device, [11, 12, 13, 14, 15], confidence, rule, amount)
    result = check_exact("commit", case)
    assert committed_by(result) == expected
    tokens = [11 + p if p in expected else MASK for p in range(5)]
    assert result["tokens"].tolist() == [tokens]
    assert result["status"].tolist() == [[len(expected), 5 - len(expected), -1, 0]]


def test_eos_drops_the_masks_to_its_right(device: torch.device) -> None:
    """The leftmost EOS of the call cuts; what the call committed behind it stays committed."""
    confidence = [0.2, 0.95, 0.1, 0.99, 0.96, 0.3]
    case = one_sequence(device, [11, EOS, 13, EOS, 15, 16], confidence, THRESHOLD, 0.9)
    result = check_exact("commit", case)
    assert result["tokens"].tolist() == [[MASK, EOS, MASK, EOS, 15, MASK]]
    assert result["masked"].tolist() == [[True, False, False, False, False, False]]
    assert committed_by(result) == [1, 3, 4]
    assert result["status"].tolist() == [[3, 1, 1, 0]]


def test_only_the_first_eos_cuts(device: torch.device) -> None:
    case = one_sequence(device, [11, EOS, 13], [0.1, 0.95, 0.1], THRESHOLD, 0.9)
    result = check_exact("commit", {**case, "eos_position": int32([2], device)})
    assert result["masked"].tolist() == [[True, False, True]]
    assert result["eos_position"].tolist() == [2]
    assert check_exact("commit", {**case, "eos_id": -1})["status"].tolist() == [[1, 2, -1, 0]]


def test_nan_commits_nothing_of_its_sequence(device: torch.device) -> None:
    case = one_sequence(device, [11, 12, 13], [0.95, math.nan, math.nan], THRESHOLD, 0.9)
    result = check_exact("commit", case)
    assert committed_by(result) == [] and result["tokens"].tolist() == [[MASK] * 3]
    assert result["status"].tolist() == [[0, 3, -1, 2]]


def test_nan_of_ignored_candidates_is_ignored(device: torch.device) -> None:
    case = one_sequence(device, [11, 12, 13], [0.95, math.nan, math.nan], THRESHOLD, 0.9)
    case["masked"][0, 1] = False
    case["candidates"][case["candidates"] == 2] = -1
    assert check_exact("commit", case)["status"].tolist() == [[1, 1, -1, 0]]


def test_a_committed_mask_token_is_done(device: torch.device) -> None:
    case = one_sequence(device, [MASK, 12], [0.95, 0.1], THRESHOLD, 0.9)
    assert check_exact("commit", case)["masked"].tolist() == [[False, True]]


@pytest.mark.parametrize("num_candidates", [*TILE_SIZES, 2000])
@pytest.mark.parametrize("rule", [(THRESHOLD, 0.9), (TOP_K, 5.0), (FACTOR, 1.5)], ids=str)
def test_sizes(
    device: torch.device, rng: torch.Generator, num_candidates: int, rule: tuple[int, float]
) -> None:
    check_exact("commit", make_case(rng, device, num_candidates, [rule, rule], levels=20))


def test_a_sequence_whose_drift_test_failed_is_left_as_it_is(
    device: torch.device, rng: torch.Generator
) -> None:
    case = make_case(rng, device, 90, [(THRESHOLD, 0.5)] * 4)
    case["num_layers"], case["first_full_layer"] = 6, int32([6, 5, 99, 0], device)
    result = check_exact("commit", case)
    for name in ("tokens", "masked", "committed", "status"):
        for s, is_stopped in enumerate((False, True, False, True)):
            assert torch.equal(result[name][s], case[name][s]) == is_stopped


def test_sequences_of_different_rules(device: torch.device, rng: torch.Generator) -> None:
    rules = [(TOP_K, 2.0), (THRESHOLD, 0.3), (FACTOR, 3.0), (THRESHOLD, 1.0), (TOP_K, 1e9)]
    check_exact("commit", make_case(rng, device, 150, rules))
    check_exact("commit", make_case(rng, device, 150, rules, eos_id=-1))
    check_exact("commit", make_case(rng, device, 150, []))


def test_contract(device: torch.device, rng: torch.Generator) -> None:
    rules = [(THRESHOLD, 0.7), (TOP_K, 20.0), (FACTOR, 5.0)]
    check_contract("commit", make_case(rng, device, 500, rules, levels=50))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from([(THRESHOLD, 0.9), (THRESHOLD, 0.05), (TOP_K, 3), (FACTOR, 1.0)]),
)
def test_any_candidates(guesses: list[tuple[int, float]], rule: tuple[int, float]) -> None:
    """At least one is committed, no more masks come back, and an EOS leaves none to its right."""
    tokens, confidence = (list(values) for values in zip(*guesses, strict=True))
    case = one_sequence(CPU, tokens, confidence, *rule)
    result = check_exact("commit", case)
    committed, masked = committed_by(result), result["masked"][0]
    assert committed and max(confidence) in [confidence[p] for p in committed]
    count, num_masked, eos, num_nan = result["status"][0].tolist()
    assert (count, num_masked, num_nan) == (len(committed), int(masked.sum()), 0)
    ends = [p for p in committed if tokens[p] == EOS]
    assert eos == (ends[0] if ends else -1)
    assert not masked[committed].any() and not (ends and masked[eos:].any())


def test_rejects(device: torch.device, rng: torch.Generator) -> None:
    case = make_case(rng, device, 20, [(THRESHOLD, 0.7), (TOP_K, 20.0)])
    check_rejects_malformed("commit", case)
    for name, bad in {
        "token": case["token"][1:],
        "confidence": case["confidence"][1:],
        "rule": case["rule"][1:],
        "amount": case["amount"][1:],
        "key_range": case["key_range"][1:],
        "first_full_layer": int32([1], device),
        "masked": case["masked"][:, 1:].contiguous(),
        "committed": case["committed"][:, 1:].contiguous(),
        "eos_position": case["eos_position"][1:],
        "status": case["status"][:, 1:].contiguous(),
    }.items():
        assert_rejected("commit", {**case, name: bad}, name, "must be [")


def test_rejects_values(rng: torch.Generator) -> None:
    case = make_case(rng, CPU, 20, [(THRESHOLD, 0.7), (TOP_K, 20.0)])
    for name, bad in {
        "rule": int32([0, 3], CPU),
        "key_range": int32([[0, 24], [0, 25]], CPU),
        "candidates": case["candidates"].clone().fill_(48),
    }.items():
        assert_rejected("commit", {**case, name: bad}, name, "got")
