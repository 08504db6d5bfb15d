"""`elastic-cache info MODEL`: what a checkpoint is and what it costs, without loading its weights.

Cache sizes are those of the cache the engine would allocate, asked for on the meta device.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic_cache.cli import options as shared
from elastic_cache.cli.table import format_bytes, format_fields

if TYPE_CHECKING:
    from elastic_cache.config import ModelConfig
    from elastic_cache.models.tokenizer import Tokenizer

_SPECIAL = ("mask", "eos", "bos", "pad", "eot")


def add_command(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "info", help="describe a checkpoint", description="Describes a checkpoint."
    )
    parser.add_argument("model", metavar="MODEL", help="tiny, a checkpoint folder, or a hub id")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    facts = describe(options.model)
    print(shared.write_json(facts) if options.json else _format(facts))
    return 0


def describe(name: str) -> dict[str, Any]:
    """Everything known of a checkpoint, as JSON-ready values; sizes in bytes and elements."""
    from elastic_cache.engine import DTYPES
    from elastic_cache.models import read_model_config
    from elastic_cache.models.checkpoint import TensorFiles, find_checkpoint, read_json
    from elastic_cache.models.tokenizer import load_tokenizer

    folder = find_checkpoint(name)
    config, tokenizer = read_model_config(folder), load_tokenizer(folder)
    stored = sorted({header.dtype for header in TensorFiles(folder).headers.values()})
    return {
        "model": name,
        "folder": str(folder),
        "architecture": config.architecture,
        "num_parameters": config.num_parameters,
        "stored_dtypes": stored,
        "bytes": {name: config.num_parameters * t.itemsize for name, t in DTYPES.items()},
        "shape": {
            field: getattr(config, field)
            for field in (
                "num_layers",
                "hidden_size",
                "num_heads",
                "num_kv_heads",
                "head_dim",
                "intermediate_size",
                "vocab_size",
                "tie_embeddings",
                "has_qkv_bias",
                "rope_theta",
                "rms_norm_eps",
            )
        },
        "context_length": config.max_length,
        "cache_bytes_per_token": {
            policy: {name: _cache_bytes(config, policy, t) for name, t in DTYPES.items()}
            for policy in _needs()
        },
        "special_ids": _special_ids(config, read_json(folder / "config.json"), tokenizer),
        "tokenizer": None if tokenizer is None else "tokenizer.json",
        "chat_template": _chat_template(folder, tokenizer),
    }


def _needs() -> dict[str, Any]:
    from elastic_cache.policies.block import BlockPolicy
    from elastic_cache.policies.elastic import ElasticPolicy
    from elastic_cache.policies.none import NonePolicy

    return {
        "none": NonePolicy.needs,
        "prefix": BlockPolicy.needs,
        "dual": BlockPolicy.needs,
        "elastic": ElasticPolicy.needs,
    }


def _cache_bytes(config: ModelConfig, policy: str, dtype: Any) -> int:
    import torch

    from elastic_cache.cache import Cache

    return Cache(config, 1, 1, _needs()[policy], torch.device("meta"), dtype).num_bytes


def _special_ids(
    config: ModelConfig, raw: dict[str, Any], tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Special tokens by role: their id, and how the tokenizer writes them."""
    ids = {role: raw.get(f"{role}_token_id") for role in _SPECIAL}
    ids.update(mask=config.mask_id, eos=None if config.eos_id < 0 else config.eos_id)
    return {
        role: {"id": value, "token": None if tokenizer is None else tokenizer.token(value)}
        for role, value in ids.items()
        if isinstance(value, int)
    }


def _chat_template(folder: Path, tokenizer: Tokenizer | None) -> str | None:
    """ "checkpoint" when it brings its own, "llada" when LLaDA's is used, None without a chat."""
    if tokenizer is None:
        return None
    from elastic_cache.models.checkpoint import read_json

    path = folder / "tokenizer_config.json"
    if (folder / "chat_template.jinja").is_file() or (
        path.is_file() and read_json(path).get("chat_template")
    ):
        return "checkpoint"
    try:
        tokenizer.render_chat([{"role": "user", "content": "?"}])
    except ValueError:
        return None
    return "llada"


def _format(facts: dict[str, Any]) -> str:
    shape, caches = facts["shape"], facts["cache_bytes_per_token"]
    templates = {"checkpoint": "the checkpoint's own", "llada": "LLaDA's (built in)", None: "none"}
    special = ", ".join(
        f"{role} {entry['id']}" + (f" {entry['token']}" if entry["token"] else "")
        for role, entry in facts["special_ids"].items()
    )
    tied = "tied" if shape["tie_embeddings"] else "untied"
    fields = [
        ("model", f"{facts['model']} ({facts['folder']})"),
        ("architecture", facts["architecture"]),
        (
            "shape",
            f"{shape['num_layers']} layers, width {shape['hidden_size']}, {shape['num_heads']} "
            f"heads ({shape['num_kv_heads']} KV) of {shape['head_dim']}, feed-forward "
            f"{shape['intermediate_size']}, vocabulary {shape['vocab_size']} ({tied})",
        ),
        ("parameters", f"{facts['num_parameters']:,} (stored as {_list(facts['stored_dtypes'])})"),
        ("weights", _sizes(facts["bytes"])),
        ("context length", f"{facts['context_length']} tokens, prompt and answer together"),
        *((f"cache per token, {policy}", _sizes(sizes)) for policy, sizes in caches.items()),
        ("special ids", special),
        ("tokenizer", facts["tokenizer"] or "none: prompts are token ids"),
        ("chat template", templates[facts["chat_template"]]),
    ]
    return format_fields(fields)


def _sizes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{format_bytes(count)} as {dtype}" for dtype, count in sizes.items())


def _list(names: list[str]) -> str:
    return ", ".join(names) or "nothing"
