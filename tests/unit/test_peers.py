"""Adapters of other projects: clear refusals, and with a checkout the same model as ours.

FAST_DLLM_CHECKOUT=<folder> python -m pytest tests/unit/test_peers.py
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from elastic_cache.engine import Engine
from elastic_cache.lab import fast_dllm
from elastic_cache.models import Model, load_model
from oracle.model import load_model as load_oracle
from tolerance import assert_close

CPU = torch.device("cpu")
CHECKOUT = os.environ.get("FAST_DLLM_CHECKOUT")
SHAPE = dict(num_layers=3, num_heads=4, head_dim=8, ffn=24, vocab=40)
VARIANTS = {
    "plain": dict(SHAPE),
    "grouped": dict(SHAPE, num_kv_heads=2),
    "tied": dict(SHAPE, tied=True),
}
needs_checkout = pytest.mark.skipif(CHECKOUT is None, reason="FAST_DLLM_CHECKOUT is not set")


@pytest.fixture
def adapter() -> ModuleType:
    return fast_dllm


def small_model(folder: Path, **shape: Any) -> Model:
    return load_model(str(write_checkpoint(folder, **(shape or SHAPE), seed=7)), CPU, torch.float32)


def build(adapter: ModuleType, model: Model) -> Any:
    assert CHECKOUT is not None
    return adapter.FastDLLM(Path(CHECKOUT), model.config, model.weights, CPU)


def test_a_missing_checkout_is_named(tmp_path: Path, adapter: ModuleType) -> None:
    model = small_model(tmp_path / "model")
    with pytest.raises(adapter.PeerError, match="must be a folder, got .*nowhere: git clone"):
        adapter.FastDLLM(tmp_path / "nowhere", model.config, model.weights, CPU)


@pytest.mark.parametrize("lacking", ["llada/generate.py", "llada/model/modeling_llada.py"])
def test_a_missing_file_is_named(tmp_path: Path, adapter: ModuleType, lacking: str) -> None:
    for file in adapter.FILES:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / lacking).unlink()
    with pytest.raises(adapter.PeerError, match=f"it lacks {lacking}: git clone"):
        adapter.load_checkout(tmp_path)


def test_a_device_without_the_weights_is_refused(tmp_path: Path, adapter: ModuleType) -> None:
    model = small_model(tmp_path)
    with pytest.raises(adapter.PeerError, match="where the weights are, cpu, got cuda:0"):
        adapter.FastDLLM(tmp_path, model.config, model.weights, torch.device("cuda:0"))


@needs_checkout
@pytest.mark.parametrize("variant", VARIANTS)
def test_its_logits_are_ours(tmp_path: Path, adapter: ModuleType, variant: str) -> None:
    model = small_model(tmp_path, **VARIANTS[variant])
    ids = torch.randint(40, (50,), generator=torch.Generator().manual_seed(3))
    logits = build(adapter, model).logits(ids)
    truth, plain = (load_oracle(tmp_path, dtype) for dtype in (torch.float64, torch.float32))
    assert_close("logits", logits, truth.forward(ids), plain.forward(ids))


@needs_checkout
def test_it_reads_our_weights_and_leaves_torch_as_it_was(
    tmp_path: Path, adapter: ModuleType
) -> None:
    model = small_model(tmp_path, **SHAPE, include_qkv_bias=True)
    assert torch.backends.cuda.mem_efficient_sdp_enabled()
    peer = build(adapter, model)
    peer.logits(torch.arange(9))
    assert torch.backends.cuda.mem_efficient_sdp_enabled()
    weights = model.weights
    ours = [weights.embedding, weights.final_norm, weights.head]
    for layer in weights.layers:
        ours += [tensor for tensor in vars(layer).values() if tensor is not None]
    storages = {tensor.untyped_storage().data_ptr() for tensor in ours}
    parameters = list(peer.model.parameters())
    assert {p.untyped_storage().data_ptr() for p in parameters} == storages
    assert sum(p.numel() for p in parameters) == model.config.num_parameters


@needs_checkout
@pytest.mark.parametrize("num_masked", [None, 3])
def test_every_step_starts_from_the_same_block(
    tmp_path: Path,
    adapter: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    num_masked: int | None,
) -> None:
    peer = build(adapter, small_model(tmp_path))
    choose = peer.checkout.generate.get_transfer_index
    seen: list[tuple[int, bool]] = []
    logits: list[torch.Tensor] = []
    blocks: list[torch.Tensor] = []

    def record(*arguments: Any) -> Any:
        tokens, chosen = choose(*arguments)
        seen.append((int(arguments[3].sum()), int(chosen.sum()) > 0))
        logits.append(arguments[0][0])
        blocks.append(arguments[4][0].clone())
        return tokens, chosen

    fill = type(peer)._fill
    filled: list[Any] = []
    monkeypatch.setattr(peer.checkout.generate, "get_transfer_index", record)
    monkeypatch.setattr(
        type(peer), "_fill", lambda self, *a: filled.append(fill(self, *a)) or filled[-1]
    )
    times = peer.time_block_step(40, 8, steps=3, warmup=2, num_masked=num_masked)
    assert len(times) == 3 and all(ms > 0 for ms in times)
    assert seen == [(num_masked or 8, True)] * 5
    # Over the cache of the same tokens, the block's logits are those of a full forward.
    before = torch.cat((filled[0].x[0, :32], blocks[0]))
    for step, block in zip(logits, blocks, strict=True):
        assert torch.equal(block, blocks[0])
        torch.testing.assert_close(step, peer.logits(before)[32:], atol=1e-4, rtol=1e-4)


@needs_checkout
def test_wrong_lengths_are_refused(tmp_path: Path, adapter: ModuleType) -> None:
    peer = build(adapter, small_model(tmp_path))
    with pytest.raises(adapter.PeerError, match="got 32, 257 and 256"):
        peer.time_block_step(257)
    with pytest.raises(adapter.PeerError, match="between 1 and block_length = 8, got 9"):
        peer.time_block_step(40, 8, num_masked=9)


@needs_checkout
@pytest.mark.parametrize("mode", ["none", "prefix", "dual"])
def test_its_own_decoding(tmp_path: Path, adapter: ModuleType, mode: str) -> None:
    """Every mask is decoded, block after block; without a cache it is our full recompute."""
    model = small_model(tmp_path)
    prompt = torch.arange(3, 12)
    ids, nfe, seconds = build(adapter, model).generate(prompt, mode, 16, 8, 0.9)
    assert torch.equal(ids[:9], prompt)
    assert not (ids == model.config.mask_id).any()
    assert nfe >= 4 and seconds > 0
    if mode == "none":
        one_block = build(adapter, model).generate(prompt, mode, 8, 8, 0.9)
        ours = Engine(model).generate(prompt, gen_length=8, policy="none", window=8)
        assert torch.equal(one_block[0][: len(prompt) + ours.num_tokens],
                           ours.ids[: len(prompt) + ours.num_tokens])  # fmt: skip
