"""Fast inference for masked-diffusion language models with an adaptive KV cache.

    engine = elastic_cache.load("tiny")
    print(engine.generate("Ava has 3 apples. Then Ava buys 4 more apples. ...").text)

Names are imported on first use, so that `elastic-cache --help` need not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elastic_cache.config import GenerationConfig, ModelConfig
    from elastic_cache.engine import Engine, load
    from elastic_cache.errors import ElasticCacheError, NonFiniteLogitsError
    from elastic_cache.request import Request
    from elastic_cache.types import Generation, Step

__version__ = "0.1.0"

_HOME = {
    "ElasticCacheError": "errors",
    "Engine": "engine",
    "Generation": "types",
    "GenerationConfig": "config",
    "ModelConfig": "config",
    "NonFiniteLogitsError": "errors",
    "Request": "request",
    "Step": "types",
    "load": "engine",
}
__all__ = [
    "ElasticCacheError",
    "Engine",
    "Generation",
    "GenerationConfig",
    "ModelConfig",
    "NonFiniteLogitsError",
    "Request",
    "Step",
    "load",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(f"elastic_cache.{_HOME[name]}"), name)
    raise AttributeError(f"module 'elastic_cache' has no attribute {name!r}")
