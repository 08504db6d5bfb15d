"""What begins and ends a step: row lists, tokens, the commit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

THRESHOLD, TOP_K, FACTOR = 0, 1, 2
"""Values of `rule` in `commit`, CommitRule in types.h."""
URGENT = 2**20
"""Of `due` in `rolling_rows`, kUrgent in rolling_rows.h."""


def select_rows(
    masked: Tensor,  # [S, C] bool
    committed: Tensor,  # [S, C] bool
    tracked: Tensor,  # [L, S, k] int32 positions, -1 = none
    window: Tensor,  # [S] int32
    lookahead: Tensor,  # [S] int32
    rows: Tensor,  # [max_rows] int32 out
    segments: Tensor,  # [S, 5] int32 out
    window_rows: Tensor,  # [max_window] int32 out
) -> None:
    """Which rows a step computes: tracked, committed, window and lookahead of every sequence."""
    capacity = masked.shape[1]
    slots: list[int] = []
    decoded: list[int] = []  # indices into slots of the window rows
    for s in range(masked.shape[0]):
        chosen = sorted({p for p in tracked[:, s].flatten().tolist() if p >= 0})
        fresh = [p for p in _positions(committed[s]) if p not in chosen]
        masks = [p for p in _positions(masked[s]) if p not in chosen and not committed[s, p]]
        split = int(window[s])
        kinds = (chosen, fresh, masks[:split], masks[split : split + int(lookahead[s])])
        if not kinds[2]:
            kinds = ([], [], [], [])  # finished
        counts = [len(positions) for positions in kinds]
        begin = len(slots)
        slots.extend(s * capacity + p for positions in kinds for p in positions)
        window_begin = begin + counts[0] + counts[1]
        decoded.extend(range(window_begin, window_begin + counts[2]))
        segments[s] = torch.tensor([begin, *counts], dtype=segments.dtype)
    _fill_padded("select_rows", "rows", rows, slots)
    _fill_padded("select_rows", "window_rows", window_rows, decoded)


def rolling_rows(
    masked: Tensor,  # [S, C] bool
    committed: Tensor,  # [S, C] bool
    window: Tensor,  # [S] int32
    num_rows: Tensor,  # [S] int32
    key_range: Tensor,  # [S, 2] int32
    ahead: int,
    repeats: int,
    reach: int,
    due: Tensor,  # [S, C] int32 in and out
    chosen: Tensor,  # [S, k] int32 out
) -> None:
    """Which cached positions are computed anew: the most due that fit beside all other rows."""
    for s in range(masked.shape[0]):
        begin, end = key_range[s].tolist()
        fresh = [p for p in _positions(committed[s]) if begin <= p < end]
        masks = [p for p in _positions(masked[s]) if begin <= p < end and not committed[s, p]]
        split = int(window[s])
        computed = {*fresh, *masks[:split]}
        others = [p for p in range(begin, end) if p not in computed]
        first = masks[0] if masks else end
        new: list[int] = due[s].tolist()
        for p in others:
            new[p] = min(new[p] + 1024 * reach // (reach + abs(p - first)), 2**31 - 1)
        for p in masks[split : split + ahead]:
            new[p] = max(new[p], URGENT)
        budget = min(max(int(num_rows[s]) - len(computed), 0), chosen.shape[1])
        most_due = sorted(others, key=lambda p: (-new[p], p))[:budget]
        for p in masks[:split]:
            new[p] = 0
        for p in fresh:
            new[p] = repeats * URGENT
        for p in most_due:
            new[p] = max(new[p] // URGENT - 1, 0) * URGENT
        due[s] = torch.tensor(new, dtype=due.dtype)
        _fill_padded("rolling_rows", "chosen", chosen[s], sorted(most_due))


def refresh_rows(
    first_full_layer: Tensor,  # [S] int32
    key_range: Tensor,  # [S, 2] int32
    layer: int,
    capacity: int,
    rows: Tensor,  # [max_rows] int32 out
    offsets: Tensor,  # [S + 1] int32 out
) -> None:
    """Every position of the sequences that run in full mode at `layer`, and where each starts."""
    slots: list[int] = []
    offsets[0] = 0
    for s, (first, last) in enumerate(key_range.tolist()):
        if layer >= int(first_full_layer[s]):
            slots.extend(range(s * capacity + first, s * capacity + last))
        offsets[s + 1] = len(slots)
    _fill_padded("refresh_rows", "rows", rows, slots)


def token_confidence(
    logits: Tensor,  # [W, V]
    noise: Tensor | None,  # [W, V] float64
    token: Tensor,  # [W] int64 out
    confidence: Tensor,  # [W] float64 out
) -> None:
    """The token to commit per row of logits and the model's probability of it."""
    if logits.shape[0] == 0:
        return
    wide = logits.double()
    chosen = (wide if noise is None else wide + noise).argmax(-1)  # ties: the first
    weights = (wide - wide.amax(-1, keepdim=True)).exp()
    sure = weights.gather(-1, chosen[:, None])[:, 0] / weights.sum(-1)
    spoilt = (wide.isnan() | wide.isposinf()).any(-1)
    token.copy_(chosen.masked_fill(spoilt, 0))
    confidence.copy_(sure.masked_fill(spoilt, math.nan))


def commit(
    token: Tensor,  # [W] int64
    confidence: Tensor,  # [W] float64
    candidates: Tensor,  # [W] int32 slots, -1 = skip
    rule: Tensor,  # [S] int32: THRESHOLD, TOP_K or FACTOR
    amount: Tensor,  # [S] float64: eps, k or factor
    key_range: Tensor,  # [S, 2] int32
    eos_id: int,
    first_full_layer: Tensor | None,  # [S] int32; below num_layers: leave the sequence as it is
    num_layers: int,
    tokens: Tensor,  # [S, C] int64 in and out
    masked: Tensor,  # [S, C] bool in and out
    committed: Tensor,  # [S, C] bool out
    eos_position: Tensor,  # [S] int32 in and out
    status: Tensor,  # [S, 4] int32 out
) -> None:
    """Commit candidates by confidence, apply the EOS rule, and report to the host."""
    capacity = tokens.shape[1]
    slots, sure = candidates.tolist(), confidence.tolist()
    for s, (first, last) in enumerate(key_range.tolist()):
        if first_full_layer is not None and first_full_layer[s] < num_layers:
            continue
        committed[s] = False
        mine = [
            w
            for w, slot in enumerate(slots)
            if slot >= 0
            and slot // capacity == s
            and first <= slot % capacity < last
            and masked[s, slot % capacity]
        ]
        num_nan = sum(math.isnan(sure[w]) for w in mine)
        best_first = sorted(mine, key=lambda w: (-sure[w], slots[w])) if num_nan == 0 else []
        count = _num_accepted([sure[w] for w in best_first], int(rule[s]), float(amount[s]))
        for w in best_first[:count]:
            position = slots[w] % capacity
            tokens[s, position] = token[w]
            masked[s, position] = False
            committed[s, position] = True
        ends = [p for p in _positions(committed[s]) if tokens[s, p] == eos_id]
        if eos_id >= 0 and ends and eos_position[s] < 0:
            eos_position[s] = ends[0]
            masked[s, ends[0] + 1 : last] = False
        report = [count, int(masked[s, first:last].sum()), int(eos_position[s]), num_nan]
        status[s] = torch.tensor(report, dtype=status.dtype)


def _num_accepted(sure: Sequence[float], rule: int, amount: float) -> int:
    """How many of the confidences, given in descending order, a commit rule accepts."""
    if not sure:
        return 0
    if rule == THRESHOLD:
        return sum(c >= min(amount, sure[0]) for c in sure)
    if rule == TOP_K:
        return min(max(int(amount), 1), len(sure))
    count = 1
    while count < len(sure) and sure[count] >= 1 - amount / (count + 2):  # r = count + 1
        count += 1
    return count


def _positions(flags: Tensor) -> list[int]:
    """Indices of the true entries of a bool vector, ascending."""
    positions: list[int] = flags.nonzero().flatten().tolist()
    return positions


def _fill_padded(op: str, name: str, out: Tensor, values: Sequence[int]) -> None:
    """Write `values` to the front of a row list and -1 behind them."""
    if len(values) > len(out):
        raise ValueError(f"{op}: {name} must hold {len(values)} rows, got room for {len(out)}")
    out.fill_(-1)
    out[: len(values)] = torch.tensor(values, dtype=out.dtype)
