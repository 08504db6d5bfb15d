"""Writes small random checkpoints as people ship them: both spellings, any shape, any sharding."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import elastic_cache
import torch
from safetensors.torch import save_file

TINY = Path(elastic_cache.__file__).parent / "data/tiny-llada"

ABSENT = object()
"""As a config override: the field is left out."""


def write_checkpoint(
    folder: Path | str,
    *,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int | None = None,
    head_dim: int = 8,
    ffn: int = 24,
    vocab: int = 40,
    scheme: str = "llada",
    shards: int = 1,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **config_overrides: Any,
) -> Path:
    """Writes config.json and the weights; returns the folder.

    `scheme` "llada" or "hf" chooses the tensor names and the spelling of the config. The mask is
    token vocab - 1, EOS vocab - 2. Equal seeds give equal weights in either scheme and any
    sharding. Logits have a standard deviation of 3 or more, so that some tokens are near certain.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    sizes = {"d": num_heads * head_dim, "kv": kv_heads * head_dim, "ffn": ffn, "vocab": vocab}
    config = (_llada_config if scheme == "llada" else _hf_config)(
        sizes, num_layers, num_heads, kv_heads, tied
    )
    config |= config_overrides
    config = {key: value for key, value in config.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    tensors = random_tensors(
        sizes, num_layers, scheme, tied, bool(config.get("include_qkv_bias")), seed
    )
    save_tensors(folder, {name: t.to(dtype) for name, t in tensors.items()}, shards)
    return folder


def write_with_tokenizer(folder: Path, **overrides: Any) -> Path:
    """A random two-layer model with the embedded model's tokenizer."""
    settings = dict(vocab=768, max_sequence_length=640, mask_token_id=2, eos_token_id=1)
    write_checkpoint(folder, **{**settings, **overrides})
    shutil.copy(TINY / "tokenizer.json", folder)
    return folder


def save_tensors(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """One model.safetensors, or `shards` files with an index, tensors dealt in order."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    per_shard = math.ceil(len(names) / shards)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i * per_shard : (i + 1) * per_shard]
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


_LLADA_NAMES = {
    "embedding": "model.transformer.wte",
    "final_norm": "model.transformer.ln_f",
    "head": "model.transformer.ff_out",
    "layer": "model.transformer.blocks.{}.{}",
    "attention_norm": "attn_norm",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "attn_out",
    "mlp_norm": "ff_norm",
    "gate": "ff_proj",
    "up": "up_proj",
    "down": "ff_out",
}
_HF_NAMES = {
    "embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "layer": "model.layers.{}.{}",
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def random_tensors(
    sizes: dict[str, int], num_layers: int, scheme: str, tied: bool, qkv_bias: bool, seed: int
) -> dict[str, torch.Tensor]:
    """Float32 tensors of a model by their names in the checkpoint."""
    names = _LLADA_NAMES if scheme == "llada" else _HF_NAMES
    generator = torch.Generator().manual_seed(seed)
    d, kv, ffn, vocab = (sizes[k] for k in ("d", "kv", "ffn", "vocab"))

    def normal(*shape: int, std: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * std

    tensors = {names["embedding"] + ".weight": normal(vocab, d, std=1.0)}
    matrices = {
        "q": (d, d), "k": (kv, d), "v": (kv, d), "o": (d, d),
        "gate": (ffn, d), "up": (ffn, d), "down": (d, ffn),
    }  # fmt: skip
    for layer in range(num_layers):
        for part in ("attention_norm", "mlp_norm"):
            name = names["layer"].format(layer, names[part])
            tensors[name + ".weight"] = 1 + normal(d, std=0.1)
        for part, shape in matrices.items():
            name = names["layer"].format(layer, names[part])
            tensors[name + ".weight"] = normal(*shape, std=1 / math.sqrt(shape[1]))
            if qkv_bias and part in "qkv":
                tensors[name + ".bias"] = normal(shape[0], std=0.5)
    tensors[names["final_norm"] + ".weight"] = 1 + normal(d, std=0.1)
    if not tied:
        tensors[names["head"] + ".weight"] = normal(vocab, d, std=3 / math.sqrt(d))
    return tensors


def _llada_config(
    sizes: dict[str, int], num_layers: int, num_heads: int, num_kv_heads: int, tied: bool
) -> dict[str, Any]:
    return {
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        "d_model": sizes["d"],
        "n_layers": num_layers,
        "n_heads": num_heads,
        "n_kv_heads": num_kv_heads,
        "mlp_hidden_size": sizes["ffn"],
        "vocab_size": sizes["vocab"],
        "embedding_size": sizes["vocab"],
        "max_sequence_length": 256,
        "rope": True,
        "rope_theta": 500000.0,
        "rope_full_precision": True,
        "rms_norm_eps": 1e-5,
        "layer_norm_type": "rms",
        "activation_type": "silu",
        "block_type": "llama",
        "include_bias": False,
        "include_qkv_bias": False,
        "weight_tying": tied,
        "multi_query_attention": None,
        "mask_token_id": sizes["vocab"] - 1,
        "eos_token_id": sizes["vocab"] - 2,
        "pad_token_id": sizes["vocab"] - 2,
    }


def _hf_config(
    sizes: dict[str, int], num_layers: int, num_heads: int, num_kv_heads: int, tied: bool
) -> dict[str, Any]:
    return {
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        "hidden_size": sizes["d"],
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "intermediate_size": sizes["ffn"],
        "vocab_size": sizes["vocab"],
        "max_position_embeddings": 256,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "mask_token_id": sizes["vocab"] - 1,
        "eos_token_id": sizes["vocab"] - 2,
    }
