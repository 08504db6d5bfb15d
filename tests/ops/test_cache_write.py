"""cache_write: fused qkv rows, rotated and scattered; what they overwrite is saved first.

Copies (v, the saved rows, every slot that is not listed) are exact, rotations are rounded.
"""

from __future__ import annotations

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
    random_slots,
    run,
    spread_rows,
)
from tolerance import assert_same_bits

EXACT = ("v_cache", "q_old", "k_old")


def make_case(
    rng: torch.Generator,
    device: torch.device,
    dtype: torch.dtype,
    num_rows: int,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    num_sequences: int = 2,
    has_old: bool = True,
) -> Case:
    """Slots are shuffled over the sequences; whatever must not be read is NaN."""
    num_heads, num_kv_heads = heads
    capacity = num_rows // num_sequences + 3
    num_slots = num_sequences * capacity
    rows = random_slots(rng, num_rows, num_slots, device)
    qkv = normal(
        rng, num_rows, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype, device=device
    )
    qkv[rows < 0] = float("nan")
    angle = torch.rand(capacity + 2, head_dim // 2, generator=rng) * 6.3
    rope = torch.cat((angle.cos(), angle.sin()), dim=-1).to(device)
    unused = torch.ones(len(rope), dtype=torch.bool, device=device)
    unused[(rows[rows >= 0] % capacity).long()] = False
    rope[unused] = float("nan")
    kind: dict[str, Any] = {"dtype": dtype, "device": device}
    return {
        "qkv": spread_rows(qkv),
        "rows": rows,
        "rope": rope,
        "capacity": capacity,
        "segments": None,
        "q_cache": normal(rng, num_slots, num_heads, head_dim, **kind),
        "k_cache": normal(rng, num_slots, num_kv_heads, head_dim, **kind),
        "v_cache": normal(rng, num_slots, num_kv_heads, head_dim, **kind),
        "q_old": poisoned(num_rows, num_heads, head_dim, **kind) if has_old else None,
        "k_old": poisoned(num_rows, num_kv_heads, head_dim, **kind) if has_old else None,
    }


def check(case: Case) -> None:
    result = check_close("cache_write", case, exact=EXACT)
    others = torch.ones(len(case["q_cache"]), dtype=torch.bool, device=case["rows"].device)
    others[case["rows"][case["rows"] >= 0].long()] = False
    for name in ("q_cache", "k_cache"):
        assert_same_bits(f"{name}, slots not listed", result[name][others], case[name][others])


def test_example(device: torch.device) -> None:
    """One head of two elements: a rotation by 90 degrees, at position 1 of sequence 1."""
    qkv = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], device=device)
    rope = torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=device)
    caches = [torch.full((4, 1, 2), 7.0, device=device) for _ in range(3)]
    old = [torch.zeros(1, 1, 2, device=device) for _ in range(2)]
    rows = torch.tensor([3], dtype=torch.int32, device=device)
    ops.cache_write(qkv, rows, rope, 2, None, *caches, *old)
    assert [cache[3].tolist() for cache in caches] == [[[-2, 1]], [[-4, 3]], [[5, 6]]]
    assert all((cache[:3] == 7).all() for cache in caches)
    assert all((saved == 7).all() for saved in old)


@pytest.mark.parametrize("num_rows", [*TILE_SIZES, 700])
def test_sizes(
    device: torch.device, rng: torch.Generator, dtype: torch.dtype, num_rows: int
) -> None:
    check(make_case(rng, device, dtype, num_rows))


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (8, 1), (5, 5)], ids=str)
@pytest.mark.parametrize("head_dim", [2, 6, 8, 30, 64, 128])
def test_heads(
    device: torch.device,
    rng: torch.Generator,
    dtype: torch.dtype,
    heads: tuple[int, int],
    head_dim: int,
) -> None:
    check(make_case(rng, device, dtype, 13, heads, head_dim, num_sequences=3))


def test_segments(device: torch.device, rng: torch.Generator, dtype: torch.dtype) -> None:
    """Queries of tracked rows alone are saved; as ever, zeros for a row that is skipped."""
    case = make_case(rng, device, dtype, 40, num_sequences=3)
    case["rows"][2] = -1
    segments = int32([[0, 7, 2, 3, 1], [13, 9, 1, 6, 0], [29, 0, 3, 8, 0]], device)
    check({**case, "segments": segments})
    saved = run(ops, "cache_write", {**case, "segments": segments})["q_old"]
    is_tracked = torch.zeros(40, dtype=torch.bool, device=device)
    is_tracked[:7], is_tracked[13:22] = True, True
    assert not saved[is_tracked].isnan().any() and saved[~is_tracked].isnan().all()
    assert not saved[2].any()
    check({**case, "segments": segments, "k_old": None})


def test_without_saving(device: torch.device, rng: torch.Generator, dtype: torch.dtype) -> None:
    case = make_case(rng, device, dtype, 33, has_old=False)
    check(case)
    only_k = make_case(rng, device, dtype, 33)
    check({**only_k, "q_old": None})


def test_all_rows_skipped(device: torch.device, rng: torch.Generator, dtype: torch.dtype) -> None:
    case = make_case(rng, device, dtype, 9)
    case["rows"].fill_(-1)
    result = run(ops, "cache_write", case)
    for name in ("q_cache", "k_cache", "v_cache"):
        assert_same_bits(name, result[name], case[name])
    assert not result["q_old"].any() and not result["k_old"].any()


def test_contract(device: torch.device, rng: torch.Generator, dtype: torch.dtype) -> None:
    check_contract("cache_write", make_case(rng, device, dtype, 300, (4, 4), 64))


def test_rejects(device: torch.device, rng: torch.Generator) -> None:
    case = make_case(rng, device, torch.float32, 9)
    check_rejects_malformed("cache_write", case)
    for name, bad in {
        "qkv": case["qkv"][:, 1:],
        "rope": case["rope"][:, 1:].contiguous(),
        "k_cache": case["k_cache"][1:],
        "v_cache": case["v_cache"][:, 1:].contiguous(),
        "q_old": case["q_old"][1:],
        "k_old": case["k_old"][..., 1:].contiguous(),
    }.items():
        assert_rejected("cache_write", {**case, name: bad}, name, "must be [")
    segments = int32([[0, 2, 1, 1, 1], [5, 1, 1, 1, 0]], device)
    assert_rejected(
        "cache_write", {**case, "segments": segments[:, 1:].contiguous()}, "segments", "must be ["
    )
    if device.type == "cpu":
        segments[1, 1] = 9
        assert_rejected("cache_write", {**case, "segments": segments}, "segments", "got begin 5")
    assert_rejected("cache_write", {**case, "capacity": 0}, "capacity", "got 0")
    assert_rejected("cache_write", {**case, "rope": case["rope"][:1]}, "rope", "got 1")
    assert_rejected(
        "cache_write", {**case, "k_cache": case["k_cache"].double()}, "k_cache", "dtype of"
    )


def test_rejects_odd_head_dim(device: torch.device, rng: torch.Generator) -> None:
    case = make_case(rng, device, torch.float32, 4, (1, 1), 4)
    for name in ("rope", "q_cache", "k_cache", "v_cache", "q_old", "k_old"):
        case[name] = case[name][..., :3].contiguous()
    assert_rejected("cache_write", {**case, "qkv": case["qkv"][:, :9]}, "head_dim", "got 3")


def test_rejects_slots_outside(rng: torch.Generator) -> None:
    case = make_case(rng, torch.device("cpu"), torch.float32, 9)
    for slot in (len(case["q_cache"]), -2):
        case["rows"][4] = slot
        assert_rejected("cache_write", case, "rows", str(slot))
