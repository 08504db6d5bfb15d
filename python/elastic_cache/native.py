"""Loads the shared object of the operators; nothing else touches `torch.ops.elastic_cache`."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch._ops import OpOverload

_PATH = Path(__file__).parent / "_ops.abi3.so"


def kernel(name: str) -> OpOverload:
    """The operator, with a fake kernel for tensors without data.

    One fake kernel serves every op: outputs are given, so there is nothing to shape.
    """
    op: OpOverload = getattr(torch.ops.elastic_cache, name).default
    torch.library.register_fake(op, lambda *args: None)
    return op


def cuda_archs() -> tuple[tuple[int, int], ...]:
    """Compute capabilities that the CUDA kernels were compiled for; none in a build without CUDA.

    Not all that they run on: see `has_cuda_code`.
    """
    try:
        archs = ctypes.CDLL(str(_PATH)).elastic_cache_cuda_archs
    except AttributeError:  # only a build with CUDA has it
        return ()
    archs.restype = ctypes.c_char_p
    numbers = (int(number) // 10 for number in archs().decode().split(","))
    return tuple(divmod(number, 10) for number in numbers)


def has_cuda_code(index: int) -> bool:
    """Whether the CUDA kernels of this build run on a GPU, in machine code or from PTX."""
    try:
        has_code = ctypes.CDLL(str(_PATH)).elastic_cache_has_cuda_code
    except AttributeError:
        return False
    # A GPU that cannot be asked (-1) has a trouble of its own, which torch will report.
    return has_code(ctypes.c_int(index)) != 0


def release_workers() -> None:
    """Ends the OpenMP workers of the calling thread; if it needs some again, they start anew.

    Every thread that enters a parallel region gets workers of its own, and keeps them. With more
    of them than cores libgomp lets all sleep at every barrier: a step of the embedded model took
    16 ms instead of 9 [2 cores], and 10 with a single thread.
    """
    try:
        # Found in what torch has loaded; 1 is omp_pause_soft.
        ctypes.CDLL(None).omp_pause_resource_all(1)
    except AttributeError:  # an OpenMP older than 5.0
        return


def _load() -> None:
    """Load the shared object beside this file; it registers schemas and kernels."""
    if not _PATH.exists():
        raise ImportError(
            f"elastic_cache: the native operators are not built ({_PATH} is missing): run "
            "`pip install --no-build-isolation -e .` in the checkout"
        )
    try:
        torch.ops.load_library(_PATH)
    except OSError as error:
        raise ImportError(
            f"elastic_cache: the native operators do not load with torch {torch.__version__} "
            f"({error}): run `pip install --no-build-isolation -e .` in the checkout again"
        ) from error


_load()
