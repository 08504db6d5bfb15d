"""LLaDA checkpoints: config.json -> ModelConfig, tensors -> ModelWeights.

Two spellings of the config (LLaDA's own, HF Llama's) and two of the tensor names are in use, in
any combination; the tensor names are recognised by the tensors themselves. A setting that this
implementation does not compute is refused, because ignoring it would give wrong answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from elastic_cache.config import ModelConfig
from elastic_cache.memory import check_memory
from elastic_cache.models.checkpoint import CheckpointError, TensorFiles
from elastic_cache.models.weights import LayerWeights, ModelWeights, rope_table

# Settings that must have one of these values; absent means the first, as in LLaDA-8B.
_LLADA_FIXED: dict[str, tuple[Any, ...]] = {
    "block_type": ("llama",),
    "layer_norm_type": ("rms",),
    "activation_type": ("silu",),
    "rope": (True,),
    "rope_full_precision": (True, None),
    "rope_scaling": (None,),
    "alibi": (False, None),
    "attention_layer_norm": (False, None),
    "bias_for_layer_norm": (False, None),
    "block_group_size": (1, None),
    "clip_qkv": (None,),
    "include_bias": (False, None),
    "input_emb_norm": (False, None),
    "layer_norm_with_affine": (True, None),
    "scale_logits": (False, None),
}
_HF_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_scaling": (None,),
    "sliding_window": (None,),
}


def read_config(raw: dict[str, Any], path: Path) -> ModelConfig:
    """The config of a LLaDA checkpoint; `path` is the file it came from, for the errors."""
    fields = _Fields(raw, path)
    config = _read_llada(fields) if "d_model" in raw else _read_hf(fields)
    if config.num_heads % config.num_kv_heads:
        raise CheckpointError(
            f"{path}: the number of heads must be a multiple of the number of KV heads, got "
            f"{config.num_heads} and {config.num_kv_heads}"
        )
    if config.head_dim % 2:
        raise CheckpointError(
            f"{path}: rotary embedding needs an even head size, got {config.head_dim}"
        )
    if config.mask_id == config.eos_id:
        raise CheckpointError(
            f"{path}: mask_token_id and eos_token_id must differ, got {config.mask_id} twice"
        )
    return config


def config_fields(config: ModelConfig) -> dict[str, Any]:
    """LLaDA's own spelling of what `read_config` reads: the sizes and the special ids."""
    return {
        "d_model": config.hidden_size,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "mlp_hidden_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "embedding_size": config.vocab_size,
        "max_sequence_length": config.max_length,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "weight_tying": config.tie_embeddings,
        "include_qkv_bias": config.has_qkv_bias,
        "mask_token_id": config.mask_id,
        "eos_token_id": config.eos_id,
    }


class _Fields:
    """Typed access to config.json with one sentence per mistake."""

    def __init__(self, raw: dict[str, Any], path: Path) -> None:
        self.raw, self.path = raw, path

    def whole(self, name: str, default: int | None = None, least: int = 1) -> int:
        value = self.raw.get(name)
        if value is None and default is not None:
            return default
        if value is None:
            raise CheckpointError(f"{self.path} lacks {name}")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise CheckpointError(
                f"{self.path}: {name} must be a whole number of at least {least}, got {value!r}"
            )
        return value

    def positive(self, name: str, default: float) -> float:
        value = self.raw.get(name)
        if value is None:
            return default
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 < value < math.inf:
            raise CheckpointError(f"{self.path}: {name} must be a positive number, got {value!r}")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.raw.get(name)
        if value is not None and not isinstance(value, bool):
            raise CheckpointError(f"{self.path}: {name} must be true or false, got {value!r}")
        return bool(value)

    def fixed(self, rules: dict[str, tuple[Any, ...]]) -> None:
        for name, allowed in rules.items():
            value = self.raw.get(name, allowed[0])
            if value not in allowed:
                raise CheckpointError(
                    f"{self.path}: {name} = {value!r} is not supported, it must be {allowed[0]!r}"
                )

    def special_ids(self, vocab_size: int) -> tuple[int, int]:
        """mask_id and eos_id; eos_id is -1 (no EOS rule) when the config gives none."""
        if self.raw.get("mask_token_id") is None:
            raise CheckpointError(
                f"{self.path} lacks mask_token_id: add the id of the model's mask token to it "
                "(126336 for LLaDA-8B)"
            )
        mask_id = self.whole("mask_token_id", least=0)
        has_eos = self.raw.get("eos_token_id") is not None
        eos_id = self.whole("eos_token_id", least=0) if has_eos else -1
        for name, value in (("mask_token_id", mask_id), ("eos_token_id", eos_id)):
            if value >= vocab_size:
                raise CheckpointError(
                    f"{self.path}: {name} must be below the vocabulary size {vocab_size}, got "
                    f"{value}"
                )
        return mask_id, eos_id

    def divide(self, size: str, heads: str) -> int:
        total, count = self.whole(size), self.whole(heads)
        if total % count:
            raise CheckpointError(
                f"{self.path}: {size} must be a multiple of {heads}, got {total} and {count}"
            )
        return total // count


def _read_llada(fields: _Fields) -> ModelConfig:
    fields.fixed(_LLADA_FIXED)
    hidden, heads = fields.whole("d_model"), fields.whole("n_heads")
    multi_query = fields.flag("multi_query_attention")
    if fields.raw.get("mlp_hidden_size") is None:
        ffn = int(fields.positive("mlp_ratio", 4) * hidden)
    else:
        ffn = fields.whole("mlp_hidden_size")
    vocab = fields.whole("vocab_size")
    table = fields.whole("embedding_size", vocab)
    if table < vocab:
        raise CheckpointError(
            f"{fields.path}: embedding_size must be at least vocab_size, got {table} and {vocab}"
        )
    mask_id, eos_id = fields.special_ids(table)
    return ModelConfig(
        architecture="llada",
        hidden_size=hidden,
        num_layers=fields.whole("n_layers"),
        num_heads=heads,
        num_kv_heads=fields.whole("n_kv_heads", 1 if multi_query else heads),
        head_dim=fields.divide("d_model", "n_heads"),
        intermediate_size=ffn,
        vocab_size=table,
        max_length=fields.whole("max_sequence_length"),
        rope_theta=fields.positive("rope_theta", 10000.0),
        rms_norm_eps=fields.positive("rms_norm_eps", 1e-5),
        tie_embeddings=fields.flag("weight_tying"),
        has_qkv_bias=fields.flag("include_qkv_bias"),
        mask_id=mask_id,
        eos_id=eos_id,
    )


def _read_hf(fields: _Fields) -> ModelConfig:
    fields.fixed(_HF_FIXED)
    heads, vocab = fields.whole("num_attention_heads"), fields.whole("vocab_size")
    mask_id, eos_id = fields.special_ids(vocab)
    has_head_dim = fields.raw.get("head_dim") is not None
    return ModelConfig(
        architecture="llada",
        hidden_size=fields.whole("hidden_size"),
        num_layers=fields.whole("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.whole("num_key_value_heads", heads),
        head_dim=fields.whole("head_dim")
        if has_head_dim
        else fields.divide("hidden_size", "num_attention_heads"),
        intermediate_size=fields.whole("intermediate_size"),
        vocab_size=vocab,
        max_length=fields.whole("max_position_embeddings"),
        rope_theta=_hf_rope_theta(fields),
        rms_norm_eps=fields.positive("rms_norm_eps", 1e-6),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        mask_id=mask_id,
        eos_id=eos_id,
    )


def _hf_rope_theta(fields: _Fields) -> float:
    """rope_theta, which newer HF configs keep inside rope_parameters."""
    nested = fields.raw.get("rope_parameters")
    if nested is None:
        return fields.positive("rope_theta", 10000.0)
    if not isinstance(nested, dict) or nested.get("rope_type", "default") != "default":
        raise CheckpointError(
            f"{fields.path}: rope_parameters = {nested!r} is not supported, its rope_type must be "
            "'default'"
        )
    return _Fields(nested, fields.path).positive("rope_theta", 10000.0)


@dataclass(frozen=True)
class _Names:
    """One spelling of the tensor names; a fused field lists its parts in order."""

    embedding: str
    final_norm: str
    head: str
    layer: str
    parts: dict[str, tuple[str, ...]]


_LLADA_NAMES = _Names(
    embedding="model.transformer.wte.weight",
    final_norm="model.transformer.ln_f.weight",
    head="model.transformer.ff_out.weight",
    layer="model.transformer.blocks.{}.{}",
    parts={
        "attention_norm": ("attn_norm.weight",),
        "qkv": ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
        "qkv_bias": ("q_proj.bias", "k_proj.bias", "v_proj.bias"),
        "attention_out": ("attn_out.weight",),
        "mlp_norm": ("ff_norm.weight",),
        "gate_up": ("ff_proj.weight", "up_proj.weight"),
        "down": ("ff_out.weight",),
    },
)
_HF_NAMES = _Names(
    embedding="model.embed_tokens.weight",
    final_norm="model.norm.weight",
    head="lm_head.weight",
    layer="model.layers.{}.{}",
    parts={
        "attention_norm": ("input_layernorm.weight",),
        "qkv": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "qkv_bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        "attention_out": ("self_attn.o_proj.weight",),
        "mlp_norm": ("post_attention_layernorm.weight",),
        "gate_up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "down": ("mlp.down_proj.weight",),
    },
)


@dataclass(frozen=True)
class _Source:
    """A tensor of the checkpoint, and the rows of which field it becomes."""

    name: str
    shape: tuple[int, ...]
    layer: int  # -1 = a tensor of the model itself
    field: str
    first_row: int


def named_tensors(config: ModelConfig, weights: ModelWeights) -> Iterator[tuple[str, torch.Tensor]]:
    """A model's tensors by LLaDA's own names: views, also of the fused ones."""
    for source in _sources(config, _LLADA_NAMES):
        yield source.name, _destination(weights, source)


def load_weights(
    files: TensorFiles, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> ModelWeights:
    """All weights in `dtype` on `device`; every tensor is checked before memory is taken.

    Raises:
        CheckpointError: a tensor is missing, not as the config says, or cannot be read.
        ValueError: the GPU has too little free memory.
    """
    names = _recognise(files)
    sources = []
    for source in _sources(config, names):
        files.check(source.name, source.shape)
        sources.append(source)
    _refuse_extra(files, {source.name for source in sources})
    num_bytes = _allocate(config, torch.device("meta"), dtype).num_bytes
    is_wide = dtype.itemsize > 2
    check_memory(device, num_bytes, "the weights", "use dtype='bfloat16'" if is_wide else "")
    weights = _allocate(config, device, dtype)
    files.copy_to({source.name: _destination(weights, source) for source in sources}, device)
    return weights


def _recognise(files: TensorFiles) -> _Names:
    for names in (_LLADA_NAMES, _HF_NAMES):
        if names.embedding in files.headers:
            return names
    seen = next(iter(sorted(files.headers)), "no tensor at all")
    raise CheckpointError(
        f"{files.folder} holds neither {_LLADA_NAMES.embedding} (LLaDA's tensor names) nor "
        f"{_HF_NAMES.embedding} (HF Llama's); its first tensor is {seen}"
    )


def _shapes(config: ModelConfig) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of the parts of each field of a layer, in the order in which they are stacked."""
    d, ffn = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, list[tuple[int, ...]]] = {
        "attention_norm": [(d,)],
        "qkv": [(q, d), (kv, d), (kv, d)],
        "attention_out": [(d, q)],
        "mlp_norm": [(d,)],
        "gate_up": [(ffn, d), (ffn, d)],
        "down": [(d, ffn)],
    }
    if config.has_qkv_bias:
        shapes["qkv_bias"] = [(q,), (kv,), (kv,)]
    return shapes


def _sources(config: ModelConfig, names: _Names) -> Iterator[_Source]:
    d, vocab = config.hidden_size, config.vocab_size
    yield _Source(names.embedding, (vocab, d), -1, "embedding", 0)
    shapes = _shapes(config)
    for layer in range(config.num_layers):
        for field, parts in shapes.items():
            first_row = 0
            for part, shape in zip(names.parts[field], parts, strict=True):
                yield _Source(names.layer.format(layer, part), shape, layer, field, first_row)
                first_row += shape[0]
    yield _Source(names.final_norm, (d,), -1, "final_norm", 0)
    if not config.tie_embeddings:
        yield _Source(names.head, (vocab, d), -1, "head", 0)


def _refuse_extra(files: TensorFiles, expected: set[str]) -> None:
    # Old HF checkpoints store the rotary frequencies, which follow from the config.
    extra = sorted(n for n in files.headers.keys() - expected if not n.endswith("inv_freq"))
    if extra:
        raise CheckpointError(
            f"{files.headers[extra[0]].file}: tensor {extra[0]} is not part of the model that the "
            f"config describes ({len(extra)} such tensors)"
        )


def _allocate(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> ModelWeights:
    d, vocab = config.hidden_size, config.vocab_size
    embedding = torch.empty(vocab, d, dtype=dtype, device=device)
    shapes = _shapes(config)
    layers = []
    for _ in range(config.num_layers):
        fields: dict[str, Any] = {"qkv_bias": None}
        for field, parts in shapes.items():
            rows = sum(shape[0] for shape in parts)
            is_matrix = len(parts[0]) == 2
            make: Callable[..., torch.Tensor] = _transposed_empty if is_matrix else torch.empty
            fields[field] = make(rows, *parts[0][1:], dtype=dtype, device=device)
        layers.append(LayerWeights(**fields))
    tied = config.tie_embeddings
    return ModelWeights(
        embedding=embedding,
        layers=tuple(layers),
        final_norm=torch.empty(d, dtype=dtype, device=device),
        head=embedding if tied else _transposed_empty(vocab, d, dtype=dtype, device=device),
        rope=rope_table(config.max_length, config.head_dim, config.rope_theta).to(device),
    )


def _transposed_empty(
    rows: int, columns: int, *, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    return torch.empty(columns, rows, dtype=dtype, device=device).t()


def _destination(weights: ModelWeights, source: _Source) -> torch.Tensor:
    owner = weights if source.layer < 0 else weights.layers[source.layer]
    tensor: torch.Tensor = getattr(owner, source.field)
    return tensor[source.first_row : source.first_row + source.shape[0]]
