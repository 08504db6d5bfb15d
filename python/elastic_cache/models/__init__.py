"""Checkpoints as models: `load_model` finds, checks and loads one, whatever its architecture.

An architecture is a module with `read_config` and `load_weights`; adding one means adding its
module here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from elastic_cache.config import ModelConfig
from elastic_cache.models import llada
from elastic_cache.models.checkpoint import (
    CheckpointError,
    TensorFiles,
    find_checkpoint,
    read_json,
)
from elastic_cache.models.tokenizer import Tokenizer, load_tokenizer
from elastic_cache.models.weights import LayerWeights, Model, ModelWeights

__all__ = [
    "CheckpointError",
    "LayerWeights",
    "Model",
    "ModelWeights",
    "Tokenizer",
    "load_model",
    "read_model_config",
]

_BY_MODEL_TYPE = {"llada": llada}
_BY_CLASS = {"LLaDAModelLM": llada}


def load_model(name_or_path: str, device: torch.device, dtype: torch.dtype) -> Model:
    """Loads a checkpoint.

    Args:
        name_or_path: "tiny" (embedded), an existing folder, or a hub id "owner/name".
        device: where the weights go.
        dtype: floating-point dtype of the weights; the rope table is always float32.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or not of a supported kind.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point dtype, got {dtype}")
    folder = find_checkpoint(name_or_path)
    path = folder / "config.json"
    raw = read_json(path)
    architecture = _architecture(raw, path)
    config = architecture.read_config(raw, path)
    # The cheap part first: a broken tokenizer should not cost the reading of all weights.
    tokenizer = load_tokenizer(folder)
    weights = architecture.load_weights(TensorFiles(folder), config, device, dtype)
    return Model(str(name_or_path), config, weights, tokenizer, device, dtype)


def read_model_config(folder: Path) -> ModelConfig:
    """The config of a checkpoint folder, read without its weights."""
    path = folder / "config.json"
    raw = read_json(path)
    config: ModelConfig = _architecture(raw, path).read_config(raw, path)
    return config


def _architecture(raw: dict[str, Any], path: Path) -> Any:
    model_type, classes = raw.get("model_type"), raw.get("architectures") or []
    if isinstance(model_type, str) and model_type in _BY_MODEL_TYPE:
        return _BY_MODEL_TYPE[model_type]
    if model_type is None and isinstance(classes, list):
        for name, module in _BY_CLASS.items():
            if name in classes:
                return module
    supported = f"supported is model_type {', '.join(_BY_MODEL_TYPE)}"
    if isinstance(model_type, str) and model_type.lower() == "dream":
        raise CheckpointError(f"{path}: Dream models are not supported yet; {supported}")
    raise CheckpointError(
        f"{path}: model_type {model_type!r} with architectures {classes!r} is not supported; "
        f"{supported}"
    )
