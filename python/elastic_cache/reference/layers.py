"""What a layer computes: norms, products, cache writes, attention, the drift test."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor


def cache_write(
    qkv: Tensor,  # [R, (H + 2 Hkv) * D]
    rows: Tensor,  # [R] int32 slots, -1 = skip
    rope: Tensor,  # [positions, D] float32: D/2 cosines, then D/2 sines
    capacity: int,
    segments: Tensor | None,  # [S, 5] int32: save q of tracked rows alone
    q_cache: Tensor,  # [N, H, D] in and out
    k_cache: Tensor,  # [N, Hkv, D] in and out
    v_cache: Tensor,  # [N, Hkv, D] in and out
    q_old: Tensor | None,  # [R, H, D] out
    k_old: Tensor | None,  # [R, Hkv, D] out
) -> None:
    """Save the cached q and k of `rows`, then overwrite q, k (both rotated) and v there."""
    kept = rows >= 0
    slots = rows[kept].long()
    is_saved = torch.ones_like(kept) if segments is None else _is_tracked(rows, segments)
    for old, cache, saved in ((q_old, q_cache, is_saved), (k_old, k_cache, torch.ones_like(kept))):
        if old is not None:
            old[saved] = 0
            old[saved & kept] = cache[rows[saved & kept].long()]
    num_heads, head_dim = q_cache.shape[1:]
    num_kv_heads = k_cache.shape[1]
    heads = qkv[kept].view(len(slots), num_heads + 2 * num_kv_heads, head_dim)
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    angles = rope[slots % capacity]
    q_cache[slots] = _rotate(q, angles)
    k_cache[slots] = _rotate(k, angles)
    v_cache[slots] = v


def _is_tracked(rows: Tensor, segments: Tensor) -> Tensor:
    """Which rows [R] are among the tracked ones of a segment."""
    found = torch.zeros_like(rows, dtype=torch.bool)
    for begin, tracked, *_ in segments.tolist():
        found[begin : begin + tracked] = True
    return found


def window_attention(
    q_cache: Tensor,  # [N, H, D]
    k_cache: Tensor,  # [N, Hkv, D]
    v_cache: Tensor,  # [N, Hkv, D]
    rows: Tensor,  # [R] int32 slots, -1 = skip
    segments: Tensor | None,  # [S, 5] int32; says where rows lie, which they tell as well
    key_range: Tensor,  # [S, 2] int32
    scale: float,
    out: Tensor,  # [R, H, D] out
    lse: Tensor,  # [R, H] float32 out
) -> None:
    """Attention of a few rows over all keys of their sequence, unmasked, with log-sum-exp."""
    num_heads = q_cache.shape[1]
    out.zero_()
    lse.zero_()
    for mine, keys in _rows_of_sequences(rows, key_range, k_cache.shape[0]):
        q = _wide(q_cache[rows[mine].long()])
        scores = scale * _products(q, _wide(k_cache[keys]))  # [r, H, K]
        row_lse = scores.logsumexp(-1)
        weights = (scores - row_lse[..., None]).exp()
        values = _every_head(_wide(v_cache[keys]), num_heads)
        out[mine] = torch.einsum("rhk,khd->rhd", weights, values).to(out.dtype)
        lse[mine] = row_lse.to(lse.dtype)


def drift_attention(
    q_cache: Tensor,  # [N, H, D]
    k_cache: Tensor,  # [N, Hkv, D]
    v_cache: Tensor,  # [N, Hkv, D]
    q_old: Tensor | None,  # [R, H, D]
    k_old: Tensor | None,  # [R, Hkv, D]
    rows: Tensor,  # [R] int32 slots, -1 = skip
    segments: Tensor,  # [S, 5] int32
    key_range: Tensor,  # [S, 2] int32
    scale: float,
    out: Tensor,  # [R, H, D] out
    lse: Tensor,  # [R, H] float32 out
    mass: Tensor,  # [S, C] float32 out
    similarity: Tensor,  # [S] float64 out
) -> None:
    """`window_attention`, then `drift_statistics` of the same layer."""
    window_attention(q_cache, k_cache, v_cache, rows, segments, key_range, scale, out, lse)
    _drift_of_layer(
        q_cache, k_cache, q_old, k_old, rows, segments, key_range, scale, mass, similarity
    )


def drift_statistics(
    q_cache: Tensor,  # [n, N, H, D]
    k_cache: Tensor,  # [n, N, Hkv, D]
    q_old: Tensor | None,  # [n, at least R, H, D]
    k_old: Tensor | None,  # [n, at least R, Hkv, D]
    lse: Tensor | None,  # [n, at least R, H] float32 of window_attention; computed here instead
    rows: Tensor,  # [R] int32 slots, -1 = skip
    segments: Tensor,  # [S, 5] int32
    key_range: Tensor,  # [S, 2] int32
    scale: float,
    mass: Tensor,  # [n, S, C] float32 out
    similarity: Tensor,  # [n, S] float64 out
) -> None:
    """Per layer and sequence: attention mass of every key, and how far tracked rows drifted."""
    count = len(rows)
    for layer in range(len(mass)):
        _drift_of_layer(
            q_cache[layer],
            k_cache[layer],
            None if q_old is None else q_old[layer, :count],
            None if k_old is None else k_old[layer, :count],
            rows,
            segments,
            key_range,
            scale,
            mass[layer],
            similarity[layer],
        )


def _drift_of_layer(
    q_cache: Tensor,
    k_cache: Tensor,
    q_old: Tensor | None,
    k_old: Tensor | None,
    rows: Tensor,
    segments: Tensor,
    key_range: Tensor,
    scale: float,
    mass: Tensor,
    similarity: Tensor,
) -> None:
    """The cosine runs over the HEAD axis: one H-vector of weights per (tracked row, key)."""
    capacity = mass.shape[1]
    mass.zero_()
    similarity.fill_(math.inf)
    for s, (begin, tracked, committed, window, _) in enumerate(segments.tolist()):
        first, last = key_range[s].tolist()
        keys = slice(s * capacity + first, s * capacity + last)
        if first == last:
            continue

        def weights(q: Tensor, k: Tensor) -> Tensor:
            return (scale * _products(_wide(q), _wide(k))).softmax(-1)  # [r, H, K]

        window_rows = _not_skipped(rows, begin + tracked + committed, window)
        p_window = weights(q_cache[rows[window_rows].long()], k_cache[keys])
        mass[s, first:last] = p_window.sum((0, 1)).to(mass.dtype)
        test_rows = _not_skipped(rows, begin, tracked)
        if q_old is None or k_old is None or len(test_rows) == 0:
            continue
        p_new = weights(q_cache[rows[test_rows].long()], k_cache[keys])
        before = k_cache.clone()
        before[rows[rows >= 0].long()] = k_old[rows >= 0]
        p_old = weights(q_old[test_rows], before[keys])
        norms = p_old.norm(dim=1).clamp_min(1e-8) * p_new.norm(dim=1).clamp_min(1e-8)
        similarity[s] = ((p_old * p_new).sum(1) / norms).mean(dtype=torch.float64)


def drift_decision(
    similarity: Tensor,  # [n, S] float64
    gamma: Tensor,  # [S] float64
    mass: Tensor,  # [n, S, C] float32
    masked: Tensor,  # [S, C] bool, before this step's commit
    key_range: Tensor,  # [S, 2] int32
    layer: int,  # of the first of n layers
    first_full_layer: Tensor,  # [S] int32 in and out
    tracked: Tensor,  # [n, S, k] int32 out: positions, best first, padded with -1
) -> None:
    """Which layer runs in full mode next, and which positions to recompute in the next step."""
    tracked.fill_(-1)
    for i in range(len(mass)):
        failed = (similarity[i] < gamma) & (first_full_layer > layer + i + 1)
        first_full_layer[failed] = layer + i + 1
        for s, (first, last) in enumerate(key_range.tolist()):
            eligible = first + (~masked[s, first:last]).nonzero().flatten()
            order = mass[i, s, eligible].sort(descending=True, stable=True).indices
            best = eligible[order[: tracked.shape[2]]]
            tracked[i, s, : len(best)] = best.to(tracked.dtype)


def add_rms_norm(
    residual: Tensor,  # [R, d] in and out
    delta: Tensor | None,  # [R, d]
    weight: Tensor,  # [d]
    eps: float,
    out: Tensor,  # [R, d] out
    rows: Tensor | None,  # [R] int32 slots, -1 = do not store
    x_cache: Tensor | None,  # [N, d] in and out
) -> None:
    """Add `delta` to the residual, store it in `x_cache` at `rows`, and normalise it."""
    if delta is not None:
        residual += delta
    if rows is not None and x_cache is not None:
        kept = rows >= 0
        x_cache[rows[kept].long()] = residual[kept]
    x = _wide(residual)
    normed = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    out.copy_(normed.to(residual.dtype) * weight)


def linear(
    x: Tensor,  # [R, K]
    weight: Tensor,  # [K, N]
    bias: Tensor | None,  # [N]
    out: Tensor,  # [R, N] out
    batch_invariant: bool,  # changes nothing here
) -> None:
    """x weight + bias, rounded once."""
    product = _wide(x) @ _wide(weight)
    out.copy_(product if bias is None else product + _wide(bias))


def swiglu(
    gate_up: Tensor,  # [R, 2F]: gate, then up
    out: Tensor,  # [R, F] out
) -> None:
    """silu(gate) * up, the activation of the feed-forward block."""
    gate, up = gate_up.chunk(2, dim=-1)
    wide = _wide(gate)
    out.copy_((wide * wide.sigmoid()).to(gate.dtype) * up)


def project_qkv(
    residual: Tensor,  # [R, d] in and out
    delta: Tensor | None,  # [R, d]
    norm_weight: Tensor,  # [d]
    eps: float,
    weight: Tensor,  # [d, (H + 2 Hkv) * D]
    bias: Tensor | None,  # [(H + 2 Hkv) * D]
    rows: Tensor,  # [R] int32 slots, -1 = skip
    rope: Tensor,  # [positions, D] float32: D/2 cosines, then D/2 sines
    capacity: int,
    segments: Tensor | None,  # [S, 5] int32
    x_cache: Tensor | None,  # [N, d] in and out
    q_cache: Tensor,  # [N, H, D] in and out
    k_cache: Tensor,  # [N, Hkv, D] in and out
    v_cache: Tensor,  # [N, Hkv, D] in and out
    q_old: Tensor | None,  # [R, H, D] out
    k_old: Tensor | None,  # [R, Hkv, D] out
    hidden: Tensor,  # [R, d] out
    qkv: Tensor,  # [R, (H + 2 Hkv) * D] out
    batch_invariant: bool,
) -> None:
    """From the residual to q, k, v in the cache."""
    stored = None if x_cache is None else rows
    add_rms_norm(residual, delta, norm_weight, eps, hidden, stored, x_cache)
    linear(hidden, weight, bias, qkv, batch_invariant)
    cache_write(qkv, rows, rope, capacity, segments, q_cache, k_cache, v_cache, q_old, k_old)


def output_mlp(
    attention: Tensor,  # [R, H * D]
    out_weight: Tensor,  # [H * D, d]
    residual: Tensor,  # [R, d] in and out
    norm_weight: Tensor,  # [d]
    eps: float,
    gate_up_weight: Tensor,  # [d, 2F]: gate, then up
    down_weight: Tensor,  # [F, d]
    hidden: Tensor,  # [R, d] out
    gate_up: Tensor,  # [R, 2F] out
    activation: Tensor,  # [R, F] out
    delta: Tensor,  # [R, d] out
    batch_invariant: bool,
) -> None:
    """From attention to what the feed-forward block adds to the residual."""
    linear(attention, out_weight, None, delta, batch_invariant)
    add_rms_norm(residual, delta, norm_weight, eps, hidden, None, None)
    linear(hidden, gate_up_weight, None, gate_up, batch_invariant)
    swiglu(gate_up, activation)
    linear(activation, down_weight, None, delta, batch_invariant)


def _wide(x: Tensor) -> Tensor:
    """`x` in the precision that inner arithmetic uses."""
    return x if x.dtype == torch.float64 else x.float()


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """RoPE, NeoX halves, of x [R, heads, D] by angles [R, D] (cosines, then sines)."""
    cos, sin = angles.to(_wide(x).dtype)[:, None].chunk(2, dim=-1)
    left, right = _wide(x).chunk(2, dim=-1)
    rotated = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
    return rotated.to(x.dtype)


def _every_head(x: Tensor, num_heads: int) -> Tensor:
    """[K, Hkv, D] -> [K, H, D]: query head h reads key/value head h // (H / Hkv)."""
    return x.repeat_interleave(num_heads // x.shape[1], dim=1)


def _products(q: Tensor, k: Tensor) -> Tensor:
    """q [r, H, D] . k [K, Hkv, D] -> [r, H, K]."""
    return torch.einsum("rhd,khd->rhk", q, _every_head(k, q.shape[1]))


def _not_skipped(rows: Tensor, begin: int, count: int) -> Tensor:
    """Indices begin .. begin + count - 1 of the row list, without those of skipped rows."""
    return begin + (rows[begin : begin + count] >= 0).nonzero().flatten()


def _rows_of_sequences(
    rows: Tensor, key_range: Tensor, num_slots: int
) -> Iterator[tuple[Tensor, slice]]:
    """Per sequence that has rows: their indices in the row list, and the slots of its keys."""
    if len(key_range) == 0:
        return
    capacity = num_slots // len(key_range)
    for s, (first, last) in enumerate(key_range.tolist()):
        mine = ((rows >= 0) & (rows // capacity == s)).nonzero().flatten()
        if len(mine):
            yield mine, slice(s * capacity + first, s * capacity + last)
