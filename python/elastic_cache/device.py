"""A device name -> a device that this installation can use, or the sentence that says why not."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from elastic_cache import native

OLDEST_CAPABILITY = (8, 0)
"""The kernels use bfloat16 tensor cores and asynchronous copies, which are new in 8.0."""


@dataclass(frozen=True)
class Gpu:
    """What matters of a GPU that torch sees."""

    name: str
    capability: tuple[int, int]
    has_code: bool | None  # whether the CUDA kernels of this build run on it; None = not asked


@dataclass(frozen=True)
class Cuda:
    """What this installation has of CUDA."""

    torch_version: str | None  # of the CUDA that torch was built with; None = without
    gpus: Sequence[Gpu]
    archs: Sequence[tuple[int, int]]  # that the kernels were compiled for; none = built without


class Problem(NamedTuple):
    """Why a GPU cannot be used, and what to do about it."""

    reason: str
    fix: str


def find_device(name: str) -> torch.device:
    """The device "cpu", "cuda" or "cuda:N"; "cuda" is the current GPU, with its index.

    Raises:
        ValueError: there is no such device, or it cannot be used, with the reason and the fix.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cpu":
        return device
    index = device.index
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    problem = why_unusable(survey([index]), index)
    if problem is not None:
        raise ValueError(f"device is {name}, but {problem.reason}: {problem.fix}")
    return torch.device("cuda", index)


def survey(ask: Collection[int]) -> Cuda:
    """Looks at torch, its GPUs and the shared object of the operators.

    Args:
        ask: the GPUs that are asked whether the kernels run on them, which makes a context on
            each and so takes memory there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [_look_at(index, index in ask) for index in range(count)]
    return Cuda(torch.version.cuda, gpus, native.cuda_archs())


def _look_at(index: int, is_asked: bool) -> Gpu:
    seen = torch.cuda.get_device_properties(index)
    has_code = native.has_cuda_code(index) if is_asked else None
    return Gpu(seen.name, (seen.major, seen.minor), has_code)


def why_unusable(cuda: Cuda, index: int) -> Problem | None:
    """What keeps GPU `index` from being used, and the fix; None if nothing does."""
    if cuda.torch_version is None:
        return Problem(
            "this torch was built without CUDA",
            "install a CUDA build of torch and build elastic_cache again with it, or use "
            "device='cpu'",
        )
    if not cuda.gpus:
        return Problem(
            "no GPU is visible to torch",
            "look at `nvidia-smi` and CUDA_VISIBLE_DEVICES, or use device='cpu'",
        )
    if index >= len(cuda.gpus):
        last = len(cuda.gpus) - 1
        seen = f"cuda:0 to cuda:{last}" if last else "cuda:0"
        return Problem(f"torch sees only {seen}", "use one of these" if last else "use that")
    gpu = cuda.gpus[index]
    if gpu.capability < OLDEST_CAPABILITY:
        return Problem(
            f"the kernels need compute capability {_dotted(OLDEST_CAPABILITY)} (A100, RTX 30) or "
            f"newer, and {gpu.name} has {_dotted(gpu.capability)}",
            "use device='cpu'",
        )
    if not cuda.archs:
        return Problem(
            "elastic_cache was built without CUDA kernels",
            "install nvcc, then run `ELASTIC_CACHE_CUDA=1 pip install --no-build-isolation -e .` "
            "in the checkout",
        )
    if gpu.has_code is False:
        return Problem(
            f"elastic_cache was built for compute capability {format_archs(cuda.archs)} and has "
            f"no code for {_dotted(gpu.capability)} ({gpu.name})",
            f"build it again with TORCH_CUDA_ARCH_LIST='{_dotted(gpu.capability)}'",
        )
    return None


def format_archs(archs: Sequence[tuple[int, int]]) -> str:
    return " and ".join(_dotted(arch) for arch in archs)


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
