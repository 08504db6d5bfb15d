"""The engine on native ops equals the engine on `reference`: same steps, same tokens."""

from __future__ import annotations

import elastic_cache
import pytest
import torch
from elastic_cache import decoding, forward, reference, runner

from tests.checkpoints import write_checkpoint

SHAPES = [
    dict(num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, ffn=24, vocab=40),
    dict(num_layers=5, num_heads=4, num_kv_heads=2, head_dim=16, ffn=40, vocab=64),
    dict(num_layers=3, num_heads=3, num_kv_heads=1, head_dim=10, ffn=17, vocab=33),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"L{s['num_layers']}H{s['num_heads']}")
@pytest.mark.parametrize(
    "settings",
    [
        dict(policy="elastic", gamma=0.95),
        dict(policy="elastic", gamma=2.0, track_num=2),
        dict(policy="elastic", gamma=0.9, block_caching=False, tokens_per_step=2),
        dict(policy="none", factor=1.0),
        dict(policy="prefix", block_length=7),
        dict(policy="dual", block_length=8, steps=9),
    ],
    ids=lambda s: "-".join(str(value) for value in s.values()),
)
def test_native_ops_equal_the_reference(
    tmp_path, monkeypatch: pytest.MonkeyPatch, shape: dict, settings: dict
) -> None:
    folder = write_checkpoint(tmp_path / "model", **shape, seed=5)
    loaded = elastic_cache.load(str(folder))
    prompt = torch.arange(6, 17).tolist()
    settings = dict(gen_length=20, window=6, trace=True, **settings)
    native = loaded.generate(prompt, **settings)
    for module in (decoding, forward, runner):
        monkeypatch.setattr(module, "ops", reference)
    expected = loaded.generate(prompt, **settings)
    assert native.trace and expected.trace
    for ours, theirs in zip(native.trace, expected.trace, strict=True):
        assert ours.first_full_layer == theirs.first_full_layer
        assert (ours.committed, ours.tokens) == (theirs.committed, theirs.tokens)
        assert ours.tracked == theirs.tracked
        assert ours.confidence == pytest.approx(theirs.confidence, abs=1e-5)
    assert torch.equal(native.ids, expected.ids)
