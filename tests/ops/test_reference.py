"""The reference itself against textbook torch, in float64: it is what the operators answer to."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from elastic_cache import reference
from torch import Tensor

FLOAT = torch.float64
H, D = 4, 8


def int32(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def random(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=rng, dtype=FLOAT)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_window_attention_is_sdpa(rng: torch.Generator, num_kv_heads: int) -> None:
    capacity, key_range = 20, [(0, 20), (3, 17)]
    q = random(rng, 40, H, D)
    k, v = (random(rng, 40, num_kv_heads, D) for _ in range(2))
    rows = int32([5, 25, 0, 39, 19])
    out, lse = random(rng, 5, H, D), random(rng, 5, H)
    reference.window_attention(q, k, v, rows, None, int32(key_range), 1 / math.sqrt(D), out, lse)
    for r, slot in enumerate(rows.tolist()):
        first, last = (slot // capacity * capacity + p for p in key_range[slot // capacity])
        query = q[slot, :, None]  # [H, 1, D]
        keys, values = (
            x[first:last].repeat_interleave(H // num_kv_heads, 1).transpose(0, 1) for x in (k, v)
        )
        expected = F.scaled_dot_product_attention(query, keys, values)[:, 0]
        torch.testing.assert_close(out[r], expected)
        scores = (query @ keys.mT)[:, 0] / math.sqrt(D)
        torch.testing.assert_close(lse[r], scores.logsumexp(-1))


def test_add_rms_norm_is_rms_norm(rng: torch.Generator) -> None:
    residual, delta, weight = random(rng, 6, 10), random(rng, 6, 10), random(rng, 10)
    total, out, x_cache = residual + delta, torch.empty(6, 10, dtype=FLOAT), random(rng, 9, 10)
    before = x_cache.clone()
    reference.add_rms_norm(residual, delta, weight, 1e-6, out, int32([3, -1, 0, 8, -1, 5]), x_cache)
    torch.testing.assert_close(out, F.rms_norm(total, (10,), weight, 1e-6))
    torch.testing.assert_close(residual, total, rtol=0, atol=0)
    before[[3, 0, 8, 5]] = total[[0, 2, 3, 5]]
    torch.testing.assert_close(x_cache, before, rtol=0, atol=0)


def test_add_rms_norm_rounds_before_the_weight(rng: torch.Generator) -> None:
    """LLaDA's order: normalised in float32, rounded to bfloat16, then times the weight."""
    residual, weight = (random(rng, *shape).bfloat16() for shape in ((50, 64), (64,)))
    out = torch.empty_like(residual)
    reference.add_rms_norm(residual, None, weight, 1e-5, out, None, None)
    x = residual.float()
    normed = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(out, normed.bfloat16() * weight, rtol=0, atol=0)


def test_swiglu_is_silu_times_up(rng: torch.Generator) -> None:
    gate, up = random(rng, 5, 7), random(rng, 5, 7)
    out = torch.empty(5, 7, dtype=FLOAT)
    reference.swiglu(torch.cat((gate, up), -1), out)
    torch.testing.assert_close(out, F.silu(gate) * up)


def test_cache_write_rotates_by_the_position(rng: torch.Generator) -> None:
    """RoPE as a complex product; q . k then depends on the distance of the positions alone."""
    capacity, rows = 12, int32([3, 20, -1, 0])
    qkv = random(rng, 4, 3 * D)
    qkv[1] = qkv[0]
    frequency = 0.3 ** torch.arange(D // 2, dtype=FLOAT)
    angle = torch.arange(capacity)[:, None] * frequency
    rope = torch.cat((angle.cos(), angle.sin()), -1)
    q, k, v = (random(rng, 24, 1, D) for _ in range(3))
    old, q_old, k_old = (q.clone(), k.clone()), random(rng, 4, 1, D), random(rng, 4, 1, D)
    reference.cache_write(qkv, rows, rope, capacity, None, q, k, v, q_old, k_old)
    for r, slot in enumerate(rows.tolist()):
        if slot < 0:
            assert not q_old[r].any() and not k_old[r].any()
            continue
        torch.testing.assert_close(q_old[r], old[0][slot], rtol=0, atol=0)
        torch.testing.assert_close(k_old[r], old[1][slot], rtol=0, atol=0)
        torch.testing.assert_close(v[slot, 0], qkv[r, 2 * D :], rtol=0, atol=0)
        turn = torch.polar(torch.ones_like(frequency), slot % capacity * frequency)
        for cache, x in ((q, qkv[r, :D]), (k, qkv[r, D : 2 * D])):
            turned = torch.complex(x[: D // 2], x[D // 2 :]) * turn
            torch.testing.assert_close(cache[slot, 0], torch.cat((turned.real, turned.imag)))
    near = [(q[slot, 0] * k[slot, 0]).sum() for slot in (3, 20)]  # distance 0 at 3 and at 8
    torch.testing.assert_close(near[0], near[1])


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_drift_attention_is_cosine_over_heads(rng: torch.Generator, num_kv_heads: int) -> None:
    """As the published code has it: a copy of K before the write, and softmaxes in full."""
    length, scale, group = 15, 0.4, H // num_kv_heads
    q_before, k_before = random(rng, length, H, D), random(rng, length, num_kv_heads, D)
    rows = int32([4, 9, 1, 7, 12, 13, -1])  # two tracked, one committed, two window, one lookahead
    kept = rows[:6].long()
    q, k = q_before.clone(), k_before.clone()
    q[kept], k[kept] = random(rng, 6, H, D), random(rng, 6, num_kv_heads, D)

    def weights(q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
        keys = k.repeat_interleave(group, 1).transpose(0, 1)  # [H, T, D]
        return (scale * q[rows].transpose(0, 1) @ keys.mT).softmax(-1)  # [H, rows, T]

    key_range, lse = int32([[0, length]]), torch.empty(7, H, dtype=FLOAT)
    out = torch.empty(7, H, D, dtype=FLOAT)
    mass, similarity = random(rng, 1, length), random(rng, 1)
    q_old, k_old = torch.zeros(7, H, D, dtype=FLOAT), torch.zeros(7, num_kv_heads, D, dtype=FLOAT)
    q_old[:6], k_old[:6] = q_before[kept], k_before[kept]
    segments = int32([[0, 2, 1, 2, 1]])
    reference.drift_attention(
        q, k, k, q_old, k_old, rows, segments, key_range, scale, out, lse, mass, similarity
    )
    p_old, p_new = weights(q_before, k_before, kept[:2]), weights(q, k, kept[:2])
    expected = F.cosine_similarity(p_old, p_new, dim=0).mean()
    torch.testing.assert_close(similarity[0], expected)
    torch.testing.assert_close(mass[0], weights(q, k, kept[3:5]).sum((0, 1)))


def test_drift_decision_is_topk(rng: torch.Generator) -> None:
    mass, masked = random(rng, 1, 3, 30).abs(), torch.rand(3, 30, generator=rng) < 0.5
    tracked, first_full = int32([[[0] * 4] * 3]), int32([9, 9, 5])
    similarity = torch.tensor([[0.8, 0.9, 0.1]], dtype=FLOAT)
    gamma, key_range = torch.full((3,), 0.9, dtype=FLOAT), int32([[0, 30]] * 3)
    reference.drift_decision(similarity, gamma, mass, masked, key_range, 4, first_full, tracked)
    assert tracked.tolist() == mass.masked_fill(masked, 0.0).topk(4).indices.tolist()
    assert first_full.tolist() == [5, 9, 5]


@pytest.mark.parametrize("has_noise", [False, True])
def test_token_confidence_is_softmax(rng: torch.Generator, has_noise: bool) -> None:
    logits = 3 * random(rng, 6, 50)
    noise = 4 * random(rng, 6, 50) if has_noise else None
    token, confidence = torch.empty(6, dtype=torch.int64), torch.empty(6, dtype=FLOAT)
    reference.token_confidence(logits, noise, token, confidence)
    chosen = (logits if noise is None else logits + noise).argmax(-1)
    assert token.tolist() == chosen.tolist()
    expected = torch.softmax(logits, -1).gather(-1, chosen[:, None])[:, 0]
    torch.testing.assert_close(confidence, expected)


def test_float64_is_kept(rng: torch.Generator) -> None:
    """What is measured against must not pass through float32 on its way."""
    x, out = 1 + 1e-12 * random(rng, 4, 6), torch.empty(4, 3, dtype=FLOAT)
    reference.swiglu(x, out)
    assert (out != out.float().double()).all()


def test_row_lists_too_short() -> None:
    flags = torch.ones(1, 8, dtype=torch.bool)
    none = torch.zeros_like(flags)
    args = (flags, none, int32([[[-1]]]), int32([4]), int32([2]))
    segments = int32([[0] * 5])
    with pytest.raises(ValueError, match="select_rows: rows must hold 6 rows, got room for 5"):
        reference.select_rows(*args, int32([0] * 5), segments, int32([0] * 4))
    with pytest.raises(ValueError, match="select_rows: window_rows must hold 4 rows"):
        reference.select_rows(*args, int32([0] * 6), segments, int32([0] * 3))
    with pytest.raises(ValueError, match="refresh_rows: rows must hold 8 rows, got room for 7"):
        reference.refresh_rows(int32([0]), int32([[0, 8]]), 0, 8, int32([0] * 7), int32([0, 0]))
