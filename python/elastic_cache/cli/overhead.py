"""Share of a step spent outside kernels and matrix products, bracketed by two measurements.

    W  wall time of the steps after the first, without a profiler
    K  the profiler's self time of the kernel ops in the same steps
    C  what as many calls of the same ops take in a hollow model: the same number of layers, but
       width 16 and a sequence hardly longer than the window, so that no kernel has work to do

    low  = 1 - K / W         K also holds dispatch, argument checks and the profiler's own
                             cost of every call, so the true share is higher
    high = 1 - (K - C) / W   all that an op costs without work counts as overhead, also the
                             little work it still has, so the true share is lower

Runs with and without profiler take turns, and every step counts with its fastest run: steps of a
request do the same work in every run, so what is slower is the machine's doing. Replaying ops in
a loop would not do: their data would come from a warmer cache than in a step. The hollow step's
wall time is given as a check by other means: Python and dispatch alone.
"""

from __future__ import annotations

import dataclasses
import time
from bisect import bisect
from dataclasses import dataclass
from itertools import islice, pairwise
from statistics import median
from typing import Any

import torch
from torch.autograd.profiler import record_function
from torch.autograd.profiler_legacy import profile

from elastic_cache.config import GenerationConfig
from elastic_cache.engine import Engine
from elastic_cache.models.weights import LayerWeights, Model, ModelWeights, rope_table
from elastic_cache.request import Request

_NUM_RUNS = 5
_NUM_STEPS = 24
_HOLLOW_WIDTH = 16
_STEP = "one step"
_ATEN_KERNELS = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::index",
        "aten::index_select",
        "aten::copy_",
    }
)


@dataclass(frozen=True)
class Overhead:
    """Averages over the steps after the first; milliseconds, shares between 0 and 1."""

    policy: str
    num_steps: int
    step_ms: float
    kernel_ms: float
    empty_kernel_ms: float
    hollow_step_ms: float
    share_low: float
    share_high: float

    def __str__(self) -> str:
        return (
            f"{self.policy}: {self.share_low:.1%} to {self.share_high:.1%} of a step is outside "
            f"kernels and matrix products ({self.step_ms:.3f} ms a step, profiler sees "
            f"{self.kernel_ms:.3f} ms in kernels, {self.empty_kernel_ms:.3f} ms of it without "
            f"work; a hollow step takes {self.hollow_step_ms:.3f} ms)"
        )


@dataclass(frozen=True)
class _Calls:
    """Calls of one op and their self time."""

    count: int
    seconds: float


_Kernels = dict[str, _Calls]  # of one step, by op


def measure_overhead(engine: Engine, prompt: str, settings: GenerationConfig) -> Overhead:
    """Measures one request; see the head of this file for the method."""
    given = {**dataclasses.asdict(settings), "seed": settings.seed or 0}
    hollow = Engine(_hollow_model(engine.model))
    walls, kernels = _measure(engine, prompt, given)
    hollow_walls, hollow_kernels = _measure(hollow, [2], {**given, **_hollow_settings(settings)})
    empty = _seconds_per_call(hollow_kernels)
    without_work = sum(
        min(op.seconds, op.count * empty.get(name, 0.0))
        for step in kernels
        for name, op in step.items()
    )
    wall, busy = sum(walls), sum(map(_total, kernels))
    return Overhead(
        policy=settings.policy,
        num_steps=len(walls),
        step_ms=1e3 * wall / len(walls),
        kernel_ms=1e3 * busy / len(walls),
        empty_kernel_ms=1e3 * without_work / len(walls),
        hollow_step_ms=1e3 * sum(hollow_walls) / len(hollow_walls),
        share_low=1 - busy / wall,
        share_high=1 - (busy - without_work) / wall,
    )


def _measure(
    engine: Engine, prompt: str | list[int], settings: dict[str, Any]
) -> tuple[list[float], list[_Kernels]]:
    """Seconds and kernels of each step, each from its fastest run."""
    walls, kernels = [], []
    for _ in range(_NUM_RUNS):
        walls.append(_walls(engine.stream(prompt, **settings)))
        kernels.append(_kernels(engine.stream(prompt, **settings)))
    if not walls[0]:
        raise ValueError("the overhead is measured after step 0, but the answer took one step only")
    return (
        [min(step) for step in zip(*walls, strict=True)],
        [min(step, key=_total) for step in zip(*kernels, strict=True)],
    )


def _walls(request: Request) -> list[float]:
    next(request)
    times = [time.perf_counter()]
    for _ in islice(request, _NUM_STEPS):
        times.append(time.perf_counter())
    return [end - start for start, end in pairwise(times)]


def _kernels(request: Request) -> list[_Kernels]:
    """Calls and self time of the kernel ops in every step after the first."""
    next(request)
    # Not torch.profiler: its events cost more, and it writes lines of its own to standard error.
    with profile() as profiler:
        for _ in range(_NUM_STEPS):
            with record_function(_STEP):
                if request.step() is None:
                    break
    events = profiler.function_events
    starts = sorted(event.time_range.start for event in events if event.name == _STEP)
    steps: list[_Kernels] = [{} for _ in starts]
    for event in events:
        if event.name in _ATEN_KERNELS or event.name.startswith("elastic_cache::"):
            step = steps[bisect(starts, event.time_range.start) - 1]
            known = step.get(event.name, _Calls(0, 0.0))
            seconds = known.seconds + 1e-6 * event.self_cpu_time_total
            step[event.name] = _Calls(known.count + 1, seconds)
    return [step for step in steps if step]  # the last one may only have found nothing to do


def _total(kernels: _Kernels) -> float:
    return sum(op.seconds for op in kernels.values())


def _seconds_per_call(kernels: list[_Kernels]) -> dict[str, float]:
    """The median step's seconds per call of each op."""
    return {
        name: median(step[name].seconds / step[name].count for step in kernels if name in step)
        for name in set().union(*kernels)
    }


def _hollow_settings(settings: GenerationConfig) -> dict[str, Any]:
    """One token a step, a full window or block all the time, and no refresh."""
    size = settings.block_length if settings.policy in ("prefix", "dual") else settings.window
    return dict(
        gen_length=size + _NUM_STEPS + 1,
        tokens_per_step=1,
        steps=None,
        factor=None,
        gamma=-1.0,
    )


def _hollow_model(model: Model) -> Model:
    """As many layers as `model`, next to no work in any of them; ids 0 (mask) to 7, no EOS."""
    width = _HOLLOW_WIDTH
    config = dataclasses.replace(
        model.config,
        hidden_size=width,
        num_heads=1,
        num_kv_heads=1,
        head_dim=width,
        intermediate_size=width,
        vocab_size=8,
        mask_id=0,
        eos_id=-1,
        has_qkv_bias=False,
    )
    generator = torch.Generator().manual_seed(0)

    def random(rows: int) -> torch.Tensor:  # [rows, width], stored [width, rows]
        values = torch.randn(width, rows, generator=generator) / width**0.5
        return values.to(model.device, model.dtype).t()

    ones = torch.ones(width, device=model.device, dtype=model.dtype)
    layers = tuple(
        LayerWeights(
            attention_norm=ones,
            qkv=random(3 * width),
            qkv_bias=None,
            attention_out=random(width),
            mlp_norm=ones,
            gate_up=random(2 * width),
            down=random(width),
        )
        for _ in range(config.num_layers)
    )
    rope = rope_table(config.max_length, width, config.rope_theta).to(model.device)
    weights = ModelWeights(random(8), layers, ones, random(8), rope)
    return dataclasses.replace(model, name="hollow", config=config, weights=weights)
