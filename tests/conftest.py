"""Fixtures that every test shares: the device, and random numbers that depend on the test alone."""

from __future__ import annotations

import zlib

import pytest
import torch
from elastic_cache.device import survey, why_unusable


def why_no_cuda() -> str | None:
    """Why tests cannot run on the first GPU; None if they can."""
    problem = why_unusable(survey([0]), 0)
    return None if problem is None else problem.reason


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The same test body on the CPU and, where there is a GPU, on CUDA."""
    if request.param == "cuda":
        reason = why_no_cuda()
        if reason is not None:
            pytest.skip(reason)
    return torch.device(request.param)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The dtypes that the operators compute in."""
    value: torch.dtype = request.param
    return value


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    """Random numbers (on the CPU) seeded by the test's name, so that every case has its own."""
    return torch.Generator().manual_seed(zlib.crc32(request.node.name.encode()))
