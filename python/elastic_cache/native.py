"""Loads the shared object of the operators; nothing else touches `torch.ops.elastic_cache`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch._ops import OpOverload


def kernel(name: str) -> OpOverload:
    """The operator, with a fake kernel for tensors without data.

    One fake kernel serves every op: outputs are given, so there is nothing to shape.
    """
    op: OpOverload = getattr(torch.ops.elastic_cache, name).default
    torch.library.register_fake(op, lambda *args: None)
    return op


def _load() -> None:
    """Load the shared object beside this file; it registers schemas and kernels."""
    path = Path(__file__).parent / "_ops.abi3.so"
    if not path.exists():
        raise ImportError(
            f"elastic_cache: the native operators are not built ({path} is missing): run "
            "`pip install --no-build-isolation -e .` in the checkout"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"elastic_cache: the native operators do not load with torch {torch.__version__} "
            f"({error}): run `pip install --no-build-isolation -e .` in the checkout again"
        ) from error


_load()
