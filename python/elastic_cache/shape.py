"""What a runner is made for, and what a request begins with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from elastic_cache.buffers import OverwrittenRows, Workspace
from elastic_cache.cache import Cache, CacheNeeds
from elastic_cache.config import GenerationConfig
from elastic_cache.models.weights import Model
from elastic_cache.plan import RollingRule

MAX_CAPTURED_ROWS = 128
"""Rows of a window pass, of each of its sequences, that a runner on a GPU captures."""
CAPACITY_STEP = 256
"""On a GPU capacities are multiples of this, so that requests of other lengths find the graphs."""


@dataclass(frozen=True)
class RunnerShape:
    """What must agree for requests to use a runner (and the graphs it has captured).

    Attributes:
        num_sequences, capacity: S sequences of up to C positions.
        needs: what the cache keeps.
        num_candidates: the most positions decoded in a step, of a sequence.
        track_num: tracked tokens per layer where drift is tested.
        num_chosen: the most rows that `rolling` chooses.
        selects_rows: whether the device lists the rows of a step; else plans do.
        tests_drift, has_noise: whether any sequence may.
        rolling: how rows are chosen; None: no sequence does.
        eos_id: cuts the tail, -1: none does.
    """

    num_sequences: int
    capacity: int
    needs: CacheNeeds
    num_candidates: int
    track_num: int
    num_chosen: int
    selects_rows: bool
    tests_drift: bool
    rolling: RollingRule | None
    has_noise: bool
    eos_id: int

    @property
    def list_length(self) -> int:
        """Positions in each list of tracked ones."""
        return self.track_num if self.tests_drift else max(self.num_chosen, 1)

    @property
    def lists_of_chosen(self) -> int:
        """Lists that hold the chosen rows."""
        return -(-self.num_chosen // self.list_length) if self.rolling is not None else 0


@dataclass(frozen=True)
class Start:
    """What a request begins with.

    Attributes:
        ids, masked: int64 [T] and bool [T] on the CPU.
        window, lookahead, num_rows: as a Policy has them.
        tests_drift: whether this sequence does.
        reuses: whether steps after the first reuse the cache; else all are full passes.
        settings: threshold, gamma, temperature and seed.
    """

    ids: torch.Tensor
    masked: torch.Tensor
    window: int
    lookahead: int
    num_rows: int
    tests_drift: bool
    reuses: bool
    settings: GenerationConfig


def capacity_for(length: int, model: Model) -> int:
    """Positions a runner has for a sequence of `length`."""
    if model.device.type == "cpu":
        return length
    rounded = -(-length // CAPACITY_STEP) * CAPACITY_STEP
    return max(length, min(rounded, model.config.max_length))


def runner_bytes(model: Model, shape: RunnerShape) -> int:
    """Device memory that a runner's caches and buffers will take."""
    meta = torch.device("meta")
    cache = Cache(model.config, shape.num_sequences, shape.capacity, shape.needs, meta, model.dtype)
    work = Workspace.allocate(model, work_rows(shape, model.config.num_layers), meta)
    overwritten = OverwrittenRows.allocate(model, max_deferred(model, shape), meta)
    noise = 16 * shape.num_sequences * shape.num_candidates * model.config.vocab_size
    return (
        cache.num_bytes + work.num_bytes + overwritten.num_bytes + (noise if shape.has_noise else 0)
    )


def captured_rows(shape: RunnerShape) -> int:
    """Window passes of up to so many rows are captured."""
    return MAX_CAPTURED_ROWS * shape.num_sequences


def work_rows(shape: RunnerShape, depth: int) -> int:
    """Rows that any pass of a model of `depth` layers may have.

    Those of a sequence's window pass are what `rolling` fills; or the window, as many that the step
    before committed, and what is tracked in every layer.
    """
    listed = max(shape.num_chosen, 2 * shape.num_candidates + depth * shape.track_num)
    window_pass = shape.num_sequences * min(listed, shape.capacity)
    return max(shape.capacity, window_pass, captured_rows(shape))


def max_deferred(model: Model, shape: RunnerShape) -> int:
    """Rows of the window passes that test the drift of all layers at once: the captured ones."""
    return captured_rows(shape) if shape.tests_drift and model.device.type != "cpu" else 0
