"""Cases of the drift test's operators, made the way a step makes them.

That is: a cache, rows written over it, and what they overwrote.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from opcase import Case, int32, normal, poisoned
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


def condition_of(case: Case) -> float:
    """A rounding error of a score counts in its weight as often as the score is large."""
    q = case["q_cache"].double()
    q = q[..., case["rows"][case["rows"] >= 0].long(), :, :]  # [..., r, H, D]
    k = case["k_cache"].double().repeat_interleave(q.shape[-2] // case["k_cache"].shape[-2], -2)
    scores = case["scale"] * torch.einsum("...rhd,...khd->...rhk", q, k)
    return max(1.0, float(scores.nan_to_num(0.0).abs().amax()) if scores.numel() else 0.0)
