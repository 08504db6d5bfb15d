"""The oracle itself: its forward against torch's functions, its rules against hand-made cases."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from oracle.checkpoint import Shape, write_checkpoint
from oracle.generate import (
    Margins,
    Options,
    Result,
    choose,
    generate,
    most_attended,
    similarity,
)
from oracle.model import OracleModel, load_model

SHAPE = Shape(layers=3, heads=4, kv_heads=2, seed=11)


def prompt_for(shape: Shape, length: int = 9) -> list[int]:
    rng = torch.Generator().manual_seed(shape.seed)
    return torch.randint(8, shape.vocab, (length,), generator=rng).tolist()


def make(tmp_path: Path, shape: Shape, dtype: torch.dtype = torch.float64) -> OracleModel:
    return load_model(write_checkpoint(tmp_path / f"{hash(shape)}-{dtype}", shape), dtype)


def path_of(result: Result) -> list[tuple[object, ...]]:
    return [(s.committed, s.tokens) for s in result.steps]


def test_forward_equals_torch_building_blocks(tmp_path: Path) -> None:
    model = make(tmp_path, SHAPE)
    ids = torch.tensor(prompt_for(SHAPE, 21))
    w, f = model.tensors, torch.nn.functional
    x = f.embedding(ids, w["embedding"])
    half = SHAPE.head_dim // 2
    for i in range(SHAPE.layers):
        h = f.rms_norm(x, (SHAPE.hidden,), w[f"attn_norm.{i}"], 1e-5)
        q, k, v = (
            f.linear(h, w[f"{n}.{i}"]).view(len(ids), -1, SHAPE.head_dim).transpose(0, 1)
            for n in "qkv"
        )
        turned = []
        for t in (q, k):
            # The same rotation written as complex numbers: pair (j, j + half) at angle p theta_j.
            places = torch.arange(len(ids), dtype=torch.float64)
            powers = torch.arange(half, dtype=torch.float64) / half
            turn = torch.polar(
                torch.ones(len(ids), half, dtype=torch.float64),
                torch.outer(places, SHAPE.rope_theta**-powers),
            )
            pair = torch.complex(t[..., :half], t[..., half:]) * turn
            turned.append(torch.cat((pair.real, pair.imag), -1))
        o = f.scaled_dot_product_attention(
            turned[0][None], turned[1][None], v[None], enable_gqa=True
        )
        x = x + f.linear(o[0].transpose(0, 1).flatten(1), w[f"o.{i}"])
        h = f.rms_norm(x, (SHAPE.hidden,), w[f"ff_norm.{i}"], 1e-5)
        x = x + f.linear(
            f.silu(f.linear(h, w[f"gate.{i}"])) * f.linear(h, w[f"up.{i}"]), w[f"down.{i}"]
        )
    want = f.linear(f.rms_norm(x, (SHAPE.hidden,), w["final_norm"], 1e-5), w["head"])
    # The oracle's rotation table is float32 by definition, hence not 1e-12.
    torch.testing.assert_close(model.forward(ids), want, atol=2e-4, rtol=0)


@pytest.mark.parametrize("change", [{"names": "llama"}, {"shards": 3}])
def test_layout_of_the_folder_does_not_matter(tmp_path: Path, change: dict[str, object]) -> None:
    ids = torch.tensor(prompt_for(SHAPE))
    other = make(tmp_path, dataclasses.replace(SHAPE, **change))  # type: ignore[arg-type]
    assert torch.equal(make(tmp_path, SHAPE).forward(ids), other.forward(ids))


def test_tied_head_is_the_embedding(tmp_path: Path) -> None:
    model = make(tmp_path, dataclasses.replace(SHAPE, is_tied=True))
    assert model.tensors["head"] is model.tensors["embedding"]


@pytest.mark.parametrize("gamma", [0.0, -1.0])
def test_gamma_zero_never_refreshes(tmp_path: Path, gamma: float) -> None:
    result = generate(make(tmp_path, SHAPE), prompt_for(SHAPE), Options(24, gamma=gamma))
    assert [s.first_full_layer for s in result.steps] == [-1] + [3] * (result.nfe - 1)
    assert result.update_frequency == pytest.approx(4 / (3 * result.nfe))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_gamma_above_one_refreshes_from_the_second_layer(tmp_path: Path, layers: int) -> None:
    shape = dataclasses.replace(SHAPE, layers=layers)
    result = generate(make(tmp_path, shape), prompt_for(shape), Options(24, gamma=2.0))
    assert [s.first_full_layer for s in result.steps] == [-1] + [1] * (result.nfe - 1)
    assert all(len(s.sims) == 1 for s in result.steps[1:])


def test_first_step_is_a_plain_forward(tmp_path: Path) -> None:
    model, prompt = make(tmp_path, SHAPE), prompt_for(SHAPE)
    ids = torch.tensor(prompt + [SHAPE.mask_id] * 24)
    probs = torch.softmax(model.forward(ids)[9:17], -1)
    best = probs.max(-1)
    bar = min(0.9, best.values.max().item())
    want = [(9 + i, int(best.indices[i])) for i in range(8) if best.values[i] >= bar]
    for policy in ("elastic", "none"):
        step = generate(model, prompt, Options(24, policy=policy, window=8)).steps[0]
        assert list(zip(step.committed, step.tokens, strict=True)) == want


@pytest.mark.parametrize("gamma", [0.0, 0.99, 2.0])
@pytest.mark.parametrize("window", [1, 8, 100])
def test_one_layer_needs_no_refresh(tmp_path: Path, gamma: float, window: int) -> None:
    """Layer 0's inputs are always exact, so with one layer elastic must equal no cache at all."""
    shape = dataclasses.replace(SHAPE, layers=1, seed=5)
    model, prompt = make(tmp_path, shape), prompt_for(shape)
    runs = [
        generate(model, prompt, Options(32, policy=p, window=window, gamma=gamma))
        for p in ("elastic", "none")
    ]
    assert path_of(runs[0]) == path_of(runs[1])


def test_one_layer_makes_dual_exact(tmp_path: Path) -> None:
    shape = dataclasses.replace(SHAPE, layers=1, seed=5)
    model, prompt = make(tmp_path, shape), prompt_for(shape)
    dual, prefix = (
        generate(model, prompt, Options(30, policy=p, block_length=8)) for p in ("dual", "prefix")
    )
    assert path_of(dual) == path_of(prefix)
    one_block = generate(model, prompt, Options(30, policy="dual", block_length=30, threshold=0.8))
    whole = generate(model, prompt, Options(30, policy="none", window=30, threshold=0.8))
    assert whole.eos_position is None, "pick a seed without EOS: the two stop differently"
    assert path_of(one_block) == path_of(whole)


def test_rows_and_tracked_of_elastic(tmp_path: Path) -> None:
    options = Options(32, window=6, gamma=0.99, track_num=2)
    prompt = prompt_for(SHAPE)
    result = generate(make(tmp_path, SHAPE), prompt, options)
    masked = set(range(9, 41))
    for step, after in zip(result.steps, result.steps[1:], strict=False):
        assert not set(step.tracked) & masked, "a position that is still masked was tracked"
        assert 2 <= len(step.tracked) <= 2 * SHAPE.layers
        masked -= set(step.committed)
        if result.eos_position in step.committed:
            masked = {p for p in masked if p < result.eos_position}
        want = {*step.tracked, *step.committed, *sorted(masked)[:6]}
        assert set(after.rows) == want and len(after.rows) == len(want)
    assert masked == set(result.steps[-1].committed)


def test_without_block_caching_every_mask_is_a_row(tmp_path: Path) -> None:
    options = Options(32, window=6, block_caching=False, threshold=1.0)
    result = generate(make(tmp_path, SHAPE), prompt_for(SHAPE), options)
    step = result.steps[1]
    assert set(range(9, 41)) - set(result.steps[0].committed) <= set(step.rows)
    assert all(p < 9 + 6 + 1 for p in step.committed)


def test_eos_cuts_the_tail_once(tmp_path: Path) -> None:
    shape = dataclasses.replace(SHAPE, seed=3)
    model, prompt = make(tmp_path, shape), prompt_for(shape)
    free = generate(model, prompt, Options(40))
    # Whatever is committed halfway becomes the EOS; the prefix of the run stays the same.
    middle = free.steps[free.nfe // 2]
    model.eos_id = middle.tokens[0]
    result = generate(model, prompt, Options(40))
    cut = result.eos_position
    assert cut is not None
    assert (result.ids[cut:] == model.eos_id).all()
    at = next(i for i, s in enumerate(result.steps) if model.eos_id in s.tokens)
    assert path_of(result)[:at] == path_of(free)[:at]
    assert all(p < cut for s in result.steps[at + 1 :] for p in s.committed)
    assert result.num_tokens == (result.ids[9:] == model.eos_id).nonzero()[0].item()


def test_infilling_touches_masks_alone(tmp_path: Path) -> None:
    model, prompt = make(tmp_path, SHAPE), prompt_for(SHAPE, 20)
    holes = {2, 3, 9, 10, 11, 18}
    ids = [SHAPE.mask_id if i in holes else t for i, t in enumerate(prompt)]
    for policy in ("none", "prefix", "dual", "elastic", "rolling"):
        options = Options(3, policy=policy, window=4, block_length=5)
        result = generate(model, ids, options)
        kept = [i for i in range(20) if i not in holes]
        assert result.ids[kept].tolist() == [prompt[i] for i in kept]
        assert {p for s in result.steps for p in s.committed} <= holes | {20, 21, 22}


def test_commit_rules() -> None:
    def taken(confidence: list[float], count: int | None = None, **options: float) -> int:
        return choose(confidence, Options(1, **options), count, Margins())  # type: ignore[arg-type]

    assert taken([0.95, 0.9, 0.89]) == 2
    assert taken([0.5, 0.4]) == 1
    assert taken([0.5, 0.5, 0.4]) == 2
    assert taken([0.5, 0.4, 0.3], count=2) == 2
    assert taken([0.5], count=4) == 1
    # factor 1: bars 1/2, 2/3, 3/4, 4/5 for the first, second, ... best
    assert taken([0.1, 0.05], factor=1.0) == 1
    assert taken([0.9, 0.7, 0.74, 0.9], factor=1.0) == 2
    assert taken([0.9, 0.8, 0.76, 0.79], factor=1.0) == 3


def test_margins_tell_the_closest_decision() -> None:
    margins = Margins()
    choose([0.95, 0.9 + 1e-7, 0.3], Options(1), None, margins)
    assert margins.commit == pytest.approx(1e-7, rel=1e-3)
    margins = Margins()
    choose([0.5, 0.5 - 1e-7], Options(1), None, margins)
    assert margins.commit == pytest.approx(1e-7, rel=1e-3)


def test_similarity_runs_over_heads() -> None:
    old = torch.tensor([[[0.2, 0.8]], [[0.6, 0.4]]], dtype=torch.float64)  # [H 2, tracked 1, T 2]
    new = torch.tensor([[[0.5, 0.5]], [[0.1, 0.9]]], dtype=torch.float64)
    first = (0.2 * 0.5 + 0.6 * 0.1) / math.hypot(0.2, 0.6) / math.hypot(0.5, 0.1)
    second = (0.8 * 0.5 + 0.4 * 0.9) / math.hypot(0.8, 0.4) / math.hypot(0.5, 0.9)
    assert similarity(old, new) == pytest.approx((first + second) / 2)


def test_most_attended_skips_masks() -> None:
    mass = torch.tensor([0.1, 0.9, 0.4, 0.4, 0.3])
    margins = Margins()
    assert most_attended(mass, {1}, 1, margins) == [2]
    assert margins.tracked == 0
    assert most_attended(mass, {1}, 3, Margins()) == [2, 3, 4]


def test_float32_oracle_takes_the_same_path(tmp_path: Path) -> None:
    """The matrix of test_fidelity.py is only as good as float32's agreement with float64 here."""
    shape = Shape(layers=8, heads=4, kv_heads=4, seed=8)
    runs = [
        generate(make(tmp_path, shape, dtype), prompt_for(shape), Options(40, gamma=0.95))
        for dtype in (torch.float64, torch.float32)
    ]
    for wide, narrow in zip(runs[0].steps, runs[1].steps, strict=True):
        assert wide.first_full_layer == narrow.first_full_layer
        assert (wide.committed, wide.tokens) == (narrow.committed, narrow.tokens)
        assert wide.tracked == narrow.tracked
        assert wide.sims == pytest.approx(narrow.sims, abs=5e-6)
