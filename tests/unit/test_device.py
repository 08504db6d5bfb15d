"""A GPU that cannot be used is refused in a sentence, from facts that need no GPU to be given."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from elastic_cache import device as device_module
from elastic_cache import load, native
from elastic_cache.cli import doctor
from elastic_cache.device import Cuda, Gpu, find_device, why_unusable

H200 = Gpu("NVIDIA H200", (9, 0), has_code=True)
WORKING = Cuda("13.0", [H200], [(8, 0), (9, 0)])


def one(capability: tuple[int, int], **changes: object) -> Cuda:
    return replace(WORKING, gpus=[replace(H200, name="Card", capability=capability, **changes)])


def test_a_gpu_with_code_is_used() -> None:
    assert why_unusable(WORKING, 0) is None
    assert why_unusable(one((8, 6)), 0) is None
    assert why_unusable(one((12, 0), has_code=None), 0) is None  # not asked is no reason


@pytest.mark.parametrize(
    "cuda, index, reason, fix",
    [
        (replace(WORKING, torch_version=None), 0, "torch was built without CUDA", "CUDA build"),
        (replace(WORKING, gpus=[]), 0, "no GPU is visible", "CUDA_VISIBLE_DEVICES"),
        (WORKING, 7, "torch sees only cuda:0", "use that"),
        (replace(WORKING, gpus=[H200, H200]), 2, "only cuda:0 to cuda:1", "one of these"),
        (one((7, 5)), 0, "need compute capability 8.0 .* Card has 7.5", "device='cpu'"),
        (replace(WORKING, archs=[]), 0, "built without CUDA kernels", "ELASTIC_CACHE_CUDA=1"),
        (
            one((10, 3), has_code=False),
            0,
            "built for compute capability 8.0 and 9.0 and has no code for 10.3",
            "TORCH_CUDA_ARCH_LIST='10.3'",
        ),
    ],
)
def test_what_keeps_a_gpu_from_being_used(cuda: Cuda, index: int, reason: str, fix: str) -> None:
    problem = why_unusable(cuda, index)
    assert problem is not None
    assert re.search(reason, problem.reason) and fix in problem.fix


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_load_says_why(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    facts = replace(WORKING, gpus=[])
    monkeypatch.setattr(device_module, "survey", lambda ask: facts)
    with pytest.raises(ValueError, match=f"^device is {name}, but no GPU is visible to torch: "):
        load("tiny", device=name)


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:x", ""])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="^device must be cpu, cuda or cuda:N, got "):
        find_device(name)


def test_devices_that_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(device_module, "survey", lambda ask: WORKING)
    assert find_device("cuda:0") == torch.device("cuda", 0)


def test_a_build_without_cuda_has_no_architectures() -> None:
    has_kernels = torch._C._dispatch_has_kernel_for_dispatch_key("elastic_cache::swiglu", "CUDA")
    assert bool(native.cuda_archs()) == has_kernels
    if not has_kernels:
        assert not native.has_cuda_code(0)


def test_doctor_judges_gpus() -> None:
    old = replace(H200, name="T4", capability=(7, 5))
    fine, unusable = doctor.judge_gpus(replace(WORKING, gpus=[H200, old]))
    assert (fine.value, fine.problem) == ("run", None)
    assert "T4 has 7.5" in str(unusable.problem) and unusable.fix
    assert not any(check.is_required for check in (fine, unusable))
