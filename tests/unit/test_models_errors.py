"""Damaged and unsupported checkpoints: one sentence with the file, the tensor and the rule."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from checkpoints import ABSENT, random_tensors, save_tensors, write_checkpoint
from elastic_cache.config import ModelConfig
from elastic_cache.models import CheckpointError, load_model

SIZES = {"d": 32, "kv": 32, "ffn": 24, "vocab": 40}
Q1 = "model.transformer.blocks.1.q_proj.weight"


def load(name: object) -> ModelConfig:
    return load_model(str(name), torch.device("cpu"), torch.float32).config


def refuses(name: object, *words: str) -> None:
    """Loading raises CheckpointError with one sentence that has all the words in it."""
    with pytest.raises(CheckpointError) as caught:
        load(name)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_the_error_is_a_value_error() -> None:
    assert issubclass(CheckpointError, ValueError)


def edit(change: Callable[[dict[str, torch.Tensor]], object]) -> dict[str, torch.Tensor]:
    tensors = random_tensors(SIZES, 2, "llada", False, False, seed=0)
    change(tensors)
    return tensors


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(Q1), ["lacks tensor " + Q1, "[32, 32]"]),
        (lambda t: t.update({Q1: torch.zeros(32, 31)}), [Q1, "[32, 32]", "[32, 31]"]),
        (lambda t: t.update({Q1: torch.zeros(1024)}), [Q1, "[32, 32]", "[1024]"]),
        (lambda t: t.update({Q1: torch.zeros(32, 32, dtype=torch.int32)}), [Q1, "BF16", "I32"]),
        (lambda t: t.update({"extra.weight": torch.zeros(1)}), ["extra.weight", "(1 such"]),
        (lambda t: [t.pop(k) for k in list(t) if "wte" in k], ["wte", "embed_tokens"]),
        (lambda t: t.clear() or t.update(x=torch.zeros(1)), ["first tensor is x"]),
    ],
    ids=["missing", "shape", "rank", "dtype", "extra", "no-embedding", "no-known-names"],
)
def test_wrong_tensors(
    tmp_path: Path,
    shards: int,
    change: Callable[[dict[str, torch.Tensor]], object],
    words: list[str],
) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / "model.safetensors").unlink()
    tensors = edit(change)
    save_tensors(folder, tensors, min(shards, len(tensors)))
    refuses(folder, str(folder), *words)


def test_more_layers_in_the_config_than_in_the_files(tmp_path: Path) -> None:
    refuses(write_checkpoint(tmp_path, n_layers=10**9), "lacks tensor", "blocks.2.attn_norm")


def test_fewer_layers_in_the_config_than_in_the_files(tmp_path: Path) -> None:
    refuses(write_checkpoint(tmp_path, n_layers=1), "blocks.1.attn_norm.weight", "not part of")


def test_a_tied_config_refuses_a_separate_head(tmp_path: Path) -> None:
    refuses(write_checkpoint(tmp_path, weight_tying=True), "model.transformer.ff_out.weight")


@pytest.mark.parametrize("keep", [0, 4, 100, 3000, -1])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    file = write_checkpoint(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refuses(tmp_path, str(file), "truncated")


def test_truncated_shard(tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path, shards=3) / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    refuses(tmp_path, str(file), "truncated")


def test_garbage_header(tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:40] = b"\xff" * 32
    file.write_bytes(data)
    refuses(tmp_path, str(file), "no safetensors file")


def test_missing_shard(tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path, shards=3) / "model-00003-of-00003.safetensors"
    file.unlink()
    refuses(tmp_path, f"{file} does not exist", "model.safetensors.index.json")


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda i: i["weight_map"].update(ghost="model-00001-of-00003.safetensors"),
         ["places tensor ghost", "does not hold it"]),
        (lambda i: i["weight_map"].pop(Q1), [Q1, "does not place there"]),
        (lambda i: i["weight_map"].update({Q1: "../elsewhere.safetensors"}),
         ["files of its own folder", "../elsewhere"]),
        (lambda i: i["weight_map"].update({Q1: 3}), ["files of its own folder", "got 3"]),
        (lambda i: i.pop("weight_map"), ["no weight_map"]),
    ],
    ids=["ghost", "unplaced", "outside", "no-name", "no-map"],
)  # fmt: skip
def test_wrong_index(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], words: list[str]
) -> None:
    edit_index(write_checkpoint(tmp_path, shards=3), change)
    refuses(tmp_path, "model.safetensors.index.json", *words)


def test_no_weights(tmp_path: Path) -> None:
    (write_checkpoint(tmp_path) / "model.safetensors").unlink()
    refuses(tmp_path, "neither model.safetensors nor", str(tmp_path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["config.json does not exist"]),
        (b"", ["not readable JSON"]),
        (b"{", ["not readable JSON"]),
        (b"\xff\xfe{}", ["not readable JSON"]),
        (b"[]", ["must hold a JSON object, got list"]),
        (b"{}", ["model_type None", "supported is model_type llada"]),
        (b'{"model_type": "llama"}', ["model_type 'llama'", "supported is model_type llada"]),
        (b'{"model_type": ["llada"]}', ["not supported"]),
        (b'{"model_type": "Dream"}', ["Dream models are not supported yet"]),
        (b'{"architectures": ["GPT2Model"]}', ["GPT2Model"]),
        (b'{"model_type": "llada"}', ["lacks"]),
    ],
)
def test_wrong_config_file(tmp_path: Path, text: bytes | None, words: list[str]) -> None:
    if text is not None:
        (tmp_path / "config.json").write_bytes(text)
    refuses(tmp_path, str(tmp_path / "config.json"), *words)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"mask_token_id": ABSENT}, ["lacks mask_token_id: add"]),
        ({"mask_token_id": None}, ["lacks mask_token_id: add"]),
        ({"mask_token_id": 40}, ["mask_token_id must be below the vocabulary size 40, got 40"]),
        ({"mask_token_id": -1}, ["mask_token_id must be a whole number of at least 0, got -1"]),
        ({"mask_token_id": "2"}, ["mask_token_id must be a whole number", "'2'"]),
        ({"eos_token_id": 99}, ["eos_token_id must be below"]),
        ({"eos_token_id": [1, 2]}, ["eos_token_id must be a whole number", "[1, 2]"]),
        ({"eos_token_id": 39}, ["must differ, got 39 twice"]),
        ({"d_model": 33}, ["d_model must be a multiple of n_heads, got 33 and 4"]),
        ({"d_model": 12}, ["even head size, got 3"]),
        ({"d_model": True}, ["d_model must be a whole number"]),
        ({"n_layers": ABSENT}, ["lacks n_layers"]),
        ({"n_layers": 0}, ["n_layers must be a whole number of at least 1, got 0"]),
        ({"n_heads": 4.0}, ["n_heads must be a whole number", "4.0"]),
        ({"n_kv_heads": 3}, ["multiple of the number of KV heads, got 4 and 3"]),
        ({"embedding_size": 39}, ["embedding_size must be at least vocab_size, got 39 and 40"]),
        ({"rope_theta": float("nan")}, ["rope_theta must be a positive number, got nan"]),
        ({"rms_norm_eps": "1e-5"}, ["rms_norm_eps must be a positive number"]),
        ({"rope": False}, ["rope = False is not supported, it must be True"]),
        ({"alibi": True}, ["alibi"]),
        ({"attention_layer_norm": True}, ["attention_layer_norm"]),
        ({"activation_type": "gelu"}, ["activation_type = 'gelu'", "'silu'"]),
        ({"layer_norm_type": "default"}, ["layer_norm_type", "'rms'"]),
        ({"block_type": "sequential"}, ["block_type", "'llama'"]),
        ({"include_bias": True}, ["include_bias"]),
        ({"scale_logits": True}, ["scale_logits"]),
        ({"input_emb_norm": True}, ["input_emb_norm"]),
        ({"block_group_size": 2}, ["block_group_size"]),
        ({"rope_full_precision": False}, ["rope_full_precision"]),
        ({"clip_qkv": 8.0}, ["clip_qkv"]),
        ({"weight_tying": "yes"}, ["weight_tying must be true or false, got 'yes'"]),
    ],
    ids=lambda value: "-".join(f"{k}" for k in value) if isinstance(value, dict) else "",
)
def test_wrong_llada_setting(tmp_path: Path, overrides: dict[str, Any], words: list[str]) -> None:
    refuses(write_checkpoint(tmp_path, **overrides), "config.json", *words)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"mask_token_id": ABSENT}, ["lacks mask_token_id: add"]),
        ({"hidden_size": 33}, ["hidden_size must be a multiple of num_attention_heads"]),
        ({"hidden_act": "gelu"}, ["hidden_act"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"rope_scaling": {"type": "linear"}}, ["rope_scaling"]),
        ({"rope_parameters": {"rope_type": "yarn"}}, ["rope_parameters", "'default'"]),
        ({"sliding_window": 8}, ["sliding_window"]),
    ],
)
def test_wrong_hf_setting(tmp_path: Path, overrides: dict[str, Any], words: list[str]) -> None:
    refuses(write_checkpoint(tmp_path, scheme="hf", **overrides), str(tmp_path), *words)


def test_defaults_of_a_short_llada_config(tmp_path: Path) -> None:
    folder = write_checkpoint(
        tmp_path, ffn=128, n_kv_heads=None, mlp_hidden_size=None, embedding_size=None,
        mlp_ratio=4, eos_token_id=ABSENT, block_type=ABSENT, model_type=ABSENT,
    )  # fmt: skip
    config = load(folder)
    assert (config.num_kv_heads, config.intermediate_size, config.vocab_size) == (4, 128, 40)
    assert config.eos_id == -1
    multi_query = write_checkpoint(
        tmp_path, num_kv_heads=1, n_kv_heads=None, multi_query_attention=True
    )
    assert load(multi_query).num_kv_heads == 1


def test_the_embedding_may_be_larger_than_the_vocabulary(tmp_path: Path) -> None:
    assert load(write_checkpoint(tmp_path, vocab_size=39, mask_token_id=39)).vocab_size == 40


def test_hf_config_values(tmp_path: Path) -> None:
    folder = write_checkpoint(
        tmp_path, scheme="hf", num_kv_heads=2, rope_theta=ABSENT,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"}, head_dim=8,
    )  # fmt: skip
    config = load(folder)
    assert config == ModelConfig(
        architecture="llada", hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=8, intermediate_size=24, vocab_size=40, max_length=256, rope_theta=1e6,
        rms_norm_eps=1e-5, mask_id=39, eos_id=38,
    )  # fmt: skip


def test_hf_head_size_need_not_divide_the_width(tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path, scheme="hf") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"head_dim": 16}))
    refuses(tmp_path, "self_attn.q_proj.weight must be [64, 32]", "got [32, 32]")


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    refuses(tmp_path / "nowhere", "no existing folder", "nowhere")
    refuses("tinny", "'tinny' is no existing folder, no embedded model (tiny)", "owner/name")
    file = tmp_path / "model.safetensors"
    file.touch()
    refuses(file, "must be a folder", str(file))


class Hub(ModuleType):
    """Stands for huggingface_hub: records the request and answers as told."""

    def __init__(self, answer: Path | Exception) -> None:
        super().__init__("huggingface_hub")
        self.answer, self.requests = answer, []  # type: ignore[var-annotated]

    def snapshot_download(self, repo_id: str, allow_patterns: list[str]) -> str:
        self.requests.append((repo_id, allow_patterns))
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


def test_hub_id_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(write_checkpoint(tmp_path))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert load("some-owner/Some.model_1").num_layers == 2
    patterns = ["*.safetensors", "*.json", "*.jinja"]
    assert hub.requests == [("some-owner/Some.model_1", patterns)]


def test_failed_download(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ConnectionError("no route to host\nand a long story")
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(error))
    refuses("owner/name", "'owner/name'", "ConnectionError: no route to host", "path of its folder")


def test_download_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refuses("owner/name", "pip install huggingface_hub")


def test_nothing_imports_transformers() -> None:
    source = Path(__file__).parents[2] / "python"
    for file in source.rglob("*.py"):
        assert not re.search(r"^\s*(import|from) transformers", file.read_text(), re.M), file
