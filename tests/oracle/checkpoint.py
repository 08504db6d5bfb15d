"""Random checkpoints on disk: a LLaDA config.json and safetensors, lively enough to test with.

Gains are chosen so that attention is peaked and moves when tokens are committed, and so that
some but not all predictions are confident; with the usual small initialisation every similarity
is 1, every confidence 1 / vocab, and a comparison would see one trivial path only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from .model import LLADA_NAMES, LLAMA_NAMES


@dataclass(frozen=True)
class Shape:
    """What a random checkpoint looks like; `names` is llada or llama, `shards` counts files."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int = 16
    vocab: int = 72
    intermediate: int = 48
    seed: int = 0
    names: str = "llada"
    is_tied: bool = False
    shards: int = 1
    score_gain: float = 3.0
    branch_gain: float = 1.5
    logit_gain: float = 6.0
    mask_gain: float = 0.1
    rope_theta: float = 10000.0

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim

    mask_id: int = 3
    eos_id: int = 5


def write_checkpoint(folder: Path, shape: Shape) -> Path:
    """Write the checkpoint of `shape` into `folder` (made here) and return the folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_of(shape), indent=1))
    tensors = random_tensors(shape)
    if shape.shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, index = sorted(tensors), {}
    for i in range(shape.shards):
        file = f"model-{i + 1:05d}-of-{shape.shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i :: shape.shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(part, file))
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def config_of(shape: Shape) -> dict[str, object]:
    return {
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        "d_model": shape.hidden,
        "n_layers": shape.layers,
        "n_heads": shape.heads,
        "n_kv_heads": shape.kv_heads,
        "mlp_hidden_size": shape.intermediate,
        "vocab_size": shape.vocab,
        "embedding_size": shape.vocab,
        "max_sequence_length": 1024,
        "rope": True,
        "rope_theta": shape.rope_theta,
        "rope_full_precision": True,
        "rms_norm_eps": 1e-5,
        "layer_norm_type": "rms",
        "activation_type": "silu",
        "block_type": "llama",
        "include_bias": False,
        "include_qkv_bias": False,
        "weight_tying": shape.is_tied,
        "multi_query_attention": None,
        "mask_token_id": shape.mask_id,
        "eos_token_id": shape.eos_id,
        "pad_token_id": shape.eos_id,
    }


def random_tensors(shape: Shape) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(shape.seed)
    names = LLADA_NAMES if shape.names == "llada" else LLAMA_NAMES
    d, kv = shape.hidden, shape.kv_heads * shape.head_dim

    def normal(rows: int, cols: int, gain: float) -> torch.Tensor:
        return torch.randn(rows, cols, generator=rng) * gain / cols**0.5

    def norm_weight() -> torch.Tensor:
        return 1 + 0.2 * torch.randn(d, generator=rng)

    score, branch = shape.score_gain**0.5, shape.branch_gain / shape.layers**0.5
    tensors = {}
    for layer in range(shape.layers):
        parts = {
            "attn_norm": norm_weight(),
            "ff_norm": norm_weight(),
            "q": normal(d, d, score),
            "k": normal(kv, d, score),
            "v": normal(kv, d, 1.0),
            "o": normal(d, d, branch),
            "gate": normal(shape.intermediate, d, 1.0),
            "up": normal(shape.intermediate, d, 1.0),
            "down": normal(d, shape.intermediate, branch),
        }
        tensors.update({names[key].format(layer): value for key, value in parts.items()})
    embedding = torch.randn(shape.vocab, d, generator=rng)
    # A small mask vector lets what a masked position reads from its context decide its token;
    # otherwise all masks predict the same one.
    embedding[shape.mask_id] *= shape.mask_gain
    tensors[names["embedding"]] = embedding
    tensors[names["final_norm"]] = norm_weight()
    if not shape.is_tied:
        tensors[names["head"]] = normal(shape.vocab, d, shape.logit_gain)
    return tensors
