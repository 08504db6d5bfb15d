"""An inflated model computes what the small one does: logits, tokens, drift and tracked tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import elastic_cache
import pytest
import torch
from checkpoints import write_checkpoint
from elastic_cache.config import ModelConfig
from elastic_cache.engine import Engine
from elastic_cache.models import Model, load_model
from elastic_cache.models.inflate import LLADA_8B, inflate
from elastic_cache.problems import problems
from elastic_cache.types import Step

CPU = torch.device("cpu")
SHAPE = dict(num_layers=3, num_heads=4, head_dim=8, ffn=24, vocab=40)
VARIANTS = {
    "plain": dict(SHAPE),
    "grouped": dict(SHAPE, num_kv_heads=2),
    "tied": dict(SHAPE, tied=True),
}


def target(small: ModelConfig, **changes: object) -> ModelConfig:
    """A larger shape of as many layers; 1,600 channels leave epsilon something to give."""
    sizes = dict(
        hidden_size=1600,
        num_heads=3 * small.num_heads,
        num_kv_heads=3 * small.num_kv_heads,
        head_dim=2 * small.head_dim,
        intermediate_size=5 * small.intermediate_size // 2,
        vocab_size=small.vocab_size + 300,
    )
    return dataclasses.replace(small, **{**sizes, **changes})


@pytest.fixture(scope="module")
def tiny() -> Model:
    return load_model("tiny", CPU, torch.float32)


@pytest.fixture(scope="module")
def inflated(tiny: Model) -> Model:
    return inflate(tiny, target(tiny.config, num_heads=8, num_kv_heads=8), CPU, torch.float32)


def logits(model: Model, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Of the first step's candidates, as the engine's own decoder sees them."""
    from elastic_cache import decoding

    seen: list[torch.Tensor] = []
    original = decoding.ops.token_confidence

    def spy(values: torch.Tensor, *rest: torch.Tensor) -> None:
        seen.append(values.clone())
        original(values, *rest)

    monkeypatch.setattr(decoding.ops, "token_confidence", spy)
    next(iter(Engine(model).stream(ids, gen_length=12, policy="none")))
    monkeypatch.setattr(decoding.ops, "token_confidence", original)
    return seen[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_within_rounding(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path / "model", **VARIANTS[variant], seed=7)
    small = load_model(str(folder), CPU, torch.float32)
    large = inflate(small, target(small.config), CPU, torch.float32)
    ids = torch.arange(4, 24)
    expected, actual = (logits(model, ids, monkeypatch) for model in (small, large))
    vocab = small.config.vocab_size
    scale = expected.abs().max()
    assert (actual[:, :vocab] - expected).abs().max() < 2e-5 * scale
    assert actual[:, vocab:].max() < expected.min() - 1000


def steps(model: Model, policy: str) -> Iterator[Step]:
    ((question, _),) = problems(seed=5, count=1)
    yield from elastic_cache.Engine(model).stream(
        question, gen_length=32, policy=policy, gamma=0.97
    )


@pytest.mark.parametrize("policy", ["none", "dual", "elastic"])
def test_same_tokens_and_decisions(tiny: Model, inflated: Model, policy: str) -> None:
    small, large = list(steps(tiny, policy)), list(steps(inflated, policy))
    assert len(small) > 8
    if policy == "elastic":
        assert {step.first_full_layer for step in small} - {-1, tiny.config.num_layers}
    for one, other in zip(small, large, strict=True):
        assert one.confidence == pytest.approx(other.confidence, abs=1e-4)
        assert one.similarity == pytest.approx(other.similarity, abs=1e-4)
        one, other = (
            dataclasses.replace(step, confidence=[], similarity=[]) for step in (one, other)
        )
        assert one == other


def test_no_part_of_a_matrix_is_empty(inflated: Model) -> None:
    """Zeros would cost less than weights: only the channel of the constant has them."""
    layer = inflated.weights.layers[0]
    width = inflated.config.hidden_size - 1
    for matrix in (layer.qkv[:, :width], layer.gate_up[:, :width], layer.attention_out[:width]):
        assert (matrix == 0).float().mean() < 1e-3
        deviation = matrix.std()
        assert (matrix.norm(dim=1) > 0.01 * deviation * matrix.shape[1] ** 0.5).all()
    assert (layer.down[:width] == 0).float().mean() < 1e-3


def test_the_constant_survives_every_layer(inflated: Model) -> None:
    for layer in inflated.weights.layers:
        assert not layer.attention_out[-1].any() and not layer.down[-1].any()
        assert not layer.qkv[:, -1].any() and not layer.gate_up[:, -1].any()


def test_matrices_are_stored_as_loaded_ones(inflated: Model) -> None:
    layer, head = inflated.weights.layers[0], inflated.weights.head
    for matrix in (layer.qkv, layer.attention_out, layer.gate_up, layer.down, head):
        assert matrix.t().is_contiguous()


def test_another_seed_is_another_model(tiny: Model) -> None:
    shape = target(tiny.config, hidden_size=1563)
    first, again, other = (inflate(tiny, shape, CPU, torch.float32, seed) for seed in (1, 1, 2))
    assert torch.equal(first.weights.layers[3].qkv, again.weights.layers[3].qkv)
    assert not torch.equal(first.weights.layers[3].qkv, other.weights.layers[3].qkv)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_layers": 33}, "both must have as many layers, got 32 and 33"),
        ({"hidden_size": 128}, "hidden_size must grow, got 128 and 128"),
        ({"hidden_size": 1000}, "hidden_size must be at least 1563, got 1000"),
        ({"num_heads": 6}, "num_heads must become a multiple of itself, got 4 and 6"),
        ({"head_dim": 48}, "head_dim must become a multiple of itself, got 32 and 48"),
        ({"num_kv_heads": 4}, "as many queries must share a key, got 4 / 4 and 12 / 4"),
        ({"vocab_size": 700}, "vocab_size must not shrink, got 768 and 700"),
        ({"rope_theta": 1e4}, "rope_theta must be the same, got 500000.0 and 10000.0"),
    ],
)
def test_impossible_shapes(tiny: Model, changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        inflate(tiny, target(tiny.config, **changes), CPU, torch.float32)


def test_the_embedded_model_fits_into_llada_8b(tiny: Model) -> None:
    """On a device that computes nothing: the sizes are LLaDA-8B's."""
    from elastic_cache.models import inflate as module

    module._check(tiny.config, LLADA_8B)
    assert LLADA_8B.num_parameters == 8_015_581_184
