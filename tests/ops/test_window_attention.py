"""window_attention: a few rows over all keys of their sequence, and the log-sum-exp of each row."""

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
    assert_same_bits,
    check_close,
    check_contract,
    check_rejects_malformed,
    int32,
    normal,
    poisoned,
    random_slots,
    run,
)


def make_case(
    rng: torch.Generator,
    device: torch.device,
    dtype: torch.dtype,
    num_rows: int,
    key_ranges: list[tuple[int, int]],
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    scale: float | None = None,
) -> Case:
    """NaN in every key out of its sequence's range and in every query that is not listed."""
    num_heads, num_kv_heads = heads
    num_sequences = len(key_ranges)
    capacity = max([end for _, end in key_ranges] + [num_rows // num_sequences + 1]) + 2
    num_slots = num_sequences * capacity
    kind: dict[str, Any] = {"dtype": dtype, "device": device}
    rows = random_slots(rng, num_rows, num_slots, device)
    q = normal(rng, num_slots, num_heads, head_dim, **kind)
    unlisted = torch.ones(num_slots, dtype=torch.bool, device=device)
    unlisted[rows[rows >= 0].long()] = False
    q[unlisted] = float("nan")
    k, v = (normal(rng, num_slots, num_kv_heads, head_dim, **kind) for _ in range(2))
    for s, (first, end) in enumerate(key_ranges):
        for cache in (k, v):
            mine = cache[s * capacity : (s + 1) * capacity]
            mine[:first], mine[end:] = float("nan"), float("nan")
    return {
        "q_cache": q,
        "k_cache": k,
        "v_cache": v,
        "rows": rows,
        "segments": None,
        "key_range": int32(key_ranges, device),
        "scale": 1 / math.sqrt(head_dim) if scale is None else scale,
        "out": poisoned(num_rows, num_heads, head_dim, **kind),
        "lse": poisoned(num_rows, num_heads, dtype=torch.float32, device=device),
    }


def test_example(device: torch.device) -> None:
    """Two equal keys share the weight, the third is out of range: out is a mean, lse = s + ln 2."""
    q = torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]], [[0.0, 0.0]]], device=device)
    k = torch.tensor([[[2.0, 5.0]], [[2.0, -5.0]], [[9.0, 9.0]]], device=device)
    v = torch.tensor([[[1.0, 0.0]], [[3.0, 4.0]], [[9.0, 9.0]]], device=device)
    out = poisoned(2, 1, 2, dtype=torch.float32, device=device)
    lse = poisoned(2, 1, dtype=torch.float32, device=device)
    rows, key_range = int32([0, -1], device), int32([[0, 2]], device)
    ops.window_attention(q, k, v, rows, None, key_range, 0.5, out, lse)
    torch.testing.assert_close(out.cpu(), torch.tensor([[[2.0, 2.0]], [[0.0, 0.0]]]))
    torch.testing.assert_close(lse.cpu(), torch.tensor([[1 + math.log(2)], [0.0]]))


@pytest.mark.parametrize("num_rows", [*TILE_SIZES, 300])
def test_rows(
    device: torch.device, rng: torch.Generator, dtype: torch.dtype, num_rows: int
) -> None:
    check_close("window_attention", make_case(rng, device, dtype, num_rows, [(0, 40), (3, 30)]))


@pytest.mark.parametrize("num_keys", [*TILE_SIZES[1:], 127, 128, 129, 2000])
def test_keys(
    device: torch.device, rng: torch.Generator, dtype: torch.dtype, num_keys: int
) -> None:
    ranges = [(0, num_keys), (5, 5 + num_keys)]
    check_close("window_attention", make_case(rng, device, dtype, 11, ranges))


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 2), (6, 1), (9, 3)], ids=str)
@pytest.mark.parametrize("head_dim", [2, 6, 16, 64, 80, 128])
def test_heads(
    device: torch.device,
    rng: torch.Generator,
    dtype: torch.dtype,
    heads: tuple[int, int],
    head_dim: int,
) -> None:
    case = make_case(rng, device, dtype, 17, [(0, 65), (0, 9), (7, 40)], heads, head_dim)
    check_close("window_attention", case)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 30.0])
def test_scales(
    device: torch.device, rng: torch.Generator, dtype: torch.dtype, scale: float
) -> None:
    """At 30 the scores reach hundreds: exp of a raw score would overflow."""
    case = make_case(rng, device, dtype, 19, [(0, 70), (1, 50)], scale=scale)
    check_close("window_attention", case)


def test_skipped_rows_are_zero(device: torch.device, rng: torch.Generator) -> None:
    case = make_case(rng, device, torch.float32, 20, [(0, 40), (3, 30)])
    case["rows"][::2] = -1
    result = run(ops, "window_attention", case)
    assert not result["out"][::2].any() and not result["lse"][::2].any()
    case["rows"].fill_(-1)
    check_close("window_attention", case)


def group(case: Case) -> Case:
    """The same rows sequence by sequence, those skipped behind the others; and `segments`."""
    num_sequences, num_slots = len(case["key_range"]), len(case["q_cache"])
    rows = case["rows"]
    order = torch.where(rows < 0, num_slots, rows).sort().indices
    grouped = rows[order]
    sequence = grouped[grouped >= 0].cpu() // (num_slots // num_sequences)
    count = torch.bincount(sequence, minlength=num_sequences)
    segments = torch.zeros(num_sequences, 5, dtype=torch.int32)
    segments[:, 0] = count.cumsum(0) - count
    segments[:, 1] = count // 3  # of which kind a row is does not matter
    segments[:, 4] = count - count // 3
    return {**case, "rows": grouped, "segments": segments.to(rows.device)}


def only_rows(case: Case, begin: int, end: int) -> Case:
    """Rows begin .. end - 1 alone."""
    cut = {name: case[name][begin:end] for name in ("rows", "out", "lse")}
    segments = case["segments"]
    if segments is not None:
        first = segments[:, 0].clamp(begin, end)
        last = (segments[:, 0] + segments[:, 1:].sum(1)).clamp(begin, end)
        segments = torch.zeros_like(segments)
        segments[:, 0], segments[:, 2] = first - begin, last - first
    return {**case, **cut, "segments": segments}


# Keys are parted, whole (then nothing is left to combine), and whole with many rows; of 35 there
# are more than a warp looks at in one go.
@pytest.mark.parametrize("num_sequences", [2, 4, 16, 35])
@pytest.mark.parametrize("heads", [(32, 32), (28, 4)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("order", ["any", "grouped", "grouped, with gaps"])
def test_many_sequences(
    device: torch.device,
    rng: torch.Generator,
    dtype: torch.dtype,
    num_sequences: int,
    heads: tuple[int, int],
    head_dim: int,
    order: str,
) -> None:
    """Rows of all, in any order or sequence by sequence, some skipped; one has no keys. A row's
    bits are as alone."""
    ranges = [(s % 3, 20 + 11 * s) for s in range(num_sequences - 1)] + [(3, 3)]
    case = make_case(rng, device, dtype, 20 * num_sequences, ranges, heads, head_dim)
    if order != "any":
        case = group(case)
    if order != "grouped":
        case["rows"][::7] = -1
    check_close("window_attention", case)
    together = run(ops, "window_attention", case)
    for row in (0, 1, len(case["rows"]) // 2, len(case["rows"]) * 3 // 4):
        alone = run(ops, "window_attention", only_rows(case, row, row + 1))
        for name in ("out", "lse"):
            assert_same_bits(f"{name} of row {row}", alone[name][0], together[name][row])


@pytest.mark.parametrize("counts", [[150, 1, 0, 3], [0, 0, 0, 7], [0, 0, 0, 0]], ids=str)
def test_unequal_sequences(
    device: torch.device, rng: torch.Generator, dtype: torch.dtype, counts: list[int]
) -> None:
    """A sequence may have most of the rows, or all, or none; those behind are skipped."""
    capacity = 160
    case = make_case(rng, device, dtype, 160, [(0, capacity - 2)] * 4, (4, 4), 128)
    slots = [s * capacity + i for s, count in enumerate(counts) for i in range(count)]
    case["q_cache"].nan_to_num_(0.5)
    case["rows"].copy_(int32(slots + [-1] * (160 - len(slots)), device))
    case = group(case)
    check_close("window_attention", case)
    assert not run(ops, "window_attention", case)["out"][len(slots) :].any()


def test_no_key(device: torch.device, rng: torch.Generator, dtype: torch.dtype) -> None:
    """An empty sum: out = 0 and lse = log 0."""
    case = make_case(rng, device, dtype, 6, [(0, 20), (4, 4)])
    check_close("window_attention", case)


def test_contract(device: torch.device, rng: torch.Generator, dtype: torch.dtype) -> None:
    case = make_case(rng, device, dtype, 50, [(0, 300), (7, 211)], (4, 2), 64)
    check_contract("window_attention", case)
    check_contract("window_attention", group(case))


def test_rejects(device: torch.device, rng: torch.Generator) -> None:
    case = make_case(rng, device, torch.float32, 9, [(0, 8), (1, 9)])
    check_rejects_malformed("window_attention", case)
    check_rejects_malformed("window_attention", group(case))
    for name, bad in {
        "k_cache": case["k_cache"][1:],
        "v_cache": case["v_cache"][:, 1:].contiguous(),
        "out": case["out"][1:],
        "lse": case["lse"][:, 1:].contiguous(),
    }.items():
        assert_rejected("window_attention", {**case, name: bad}, name, "must be [")
    three = case["q_cache"][:, :3].contiguous()
    assert_rejected("window_attention", {**case, "q_cache": three}, "q_cache", "multiple")
    odd_range = int32([[0, 1]] * 4, device)
    assert_rejected("window_attention", {**case, "key_range": odd_range}, "q_cache", "multiple")


def test_rejects_values(rng: torch.Generator) -> None:
    device = torch.device("cpu")
    case = make_case(rng, device, torch.float32, 9, [(0, 8), (1, 9)])
    for bad in ([[0, 8], [0, 99]], [[-1, 8], [0, 9]], [[5, 4], [0, 9]]):
        bad_range = int32(bad, device)
        assert_rejected("window_attention", {**case, "key_range": bad_range}, "key_range", "got")
    grouped = group(case)
    valid = int((grouped["rows"] >= 0).sum())
    for bad in ([[0, 0, 0, 0, 9], [9, 0, 0, 0, 1]], [[0, 0, 0, 0, 0], [1, 0, 0, 0, valid - 1]]):
        wrong = {**grouped, "segments": int32(bad, device)}
        assert_rejected("window_attention", wrong, "segments", "got begin")
    for bad in ([[0, 0, 0, 0, 0], [0, 0, 0, 0, valid]], [[0, 0, 0, 0, 1], [1, 0, 0, 0, 0]]):
        wrong = {**grouped, "segments": int32(bad, device)}
        assert_rejected("window_attention", wrong, "rows", "segments says")
    case["rows"][4] = len(case["q_cache"])
    assert_rejected("window_attention", case, "rows", str(len(case["q_cache"])))
