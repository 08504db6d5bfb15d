"""Share of a step spent outside kernels and matrix products, bracketed by two measurements.

    W  wall time of the steps after the first, without a profiler (minimum of several runs)
    K  torch.profiler's self time of the kernel ops in the same steps (minimum per op)
    C  K of the same number of calls of the same ops on a hollow model: as many layers, but
       width 16 and a sequence hardly longer than the window, so that no kernel has work to do

    low  = 1 - K / W         K also holds dispatch, argument checks and the profiler's own
                             cost of every call, so the true share is higher
    high = 1 - (K - C) / W   all that an op costs without work counts as overhead, also the
                             little work it still has, so the true share is lower

Replaying ops in a loop would not do: their data would come from a warmer cache than in a step.
The hollow step's wall time is given as a check by other means: Python and dispatch alone.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from elastic_cache.config import GenerationConfig
from elastic_cache.engine import Engine
from elastic_cache.models.weights import LayerWeights, Model, ModelWeights, rope_table

_NUM_RUNS = 5
_HOLLOW_STEPS = 24
_HOLLOW_WIDTH = 16
_PRODUCTS = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
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
    """Calls of one op and their self time in microseconds."""

    count: int
    total: float


def measure_overhead(engine: Engine, prompt: str, settings: GenerationConfig) -> Overhead:
    """Measures one request; see the head of this file for the method."""
    real = dataclasses.asdict(settings)
    hollow = {**real, **_hollow_settings(settings)}
    hollow_engine = Engine(_hollow_model(engine.model))
    num_steps, wall = _wall(engine, prompt, real)
    hollow_steps, hollow_wall = _wall(hollow_engine, [2], hollow)
    calls, empty = _kernels(engine, prompt, real), _kernels(hollow_engine, [2], hollow)
    kernels = 1e-6 * sum(op.total for op in calls.values())
    without_work = 1e-6 * sum(
        min(op.total, op.count * empty[name].total / empty[name].count)
        for name, op in calls.items()
        if name in empty
    )
    return Overhead(
        policy=settings.policy,
        num_steps=num_steps,
        step_ms=1e3 * wall / num_steps,
        kernel_ms=1e3 * kernels / num_steps,
        empty_kernel_ms=1e3 * without_work / num_steps,
        hollow_step_ms=1e3 * hollow_wall / hollow_steps,
        share_low=1 - kernels / wall,
        share_high=1 - (kernels - without_work) / wall,
    )


def _wall(engine: Engine, prompt: str | list[int], settings: dict[str, Any]) -> tuple[int, float]:
    """Number of steps after the first, and the seconds they take."""
    best, num_steps = float("inf"), 0
    for _ in range(_NUM_RUNS):
        request = engine.stream(prompt, **settings)
        next(request)
        started = time.perf_counter()
        num_steps = sum(1 for _ in request)
        best = min(best, time.perf_counter() - started)
    return num_steps, best


def _kernels(
    engine: Engine, prompt: str | list[int], settings: dict[str, Any]
) -> dict[str, _Calls]:
    """Self time of every kernel op in the steps after the first."""
    best: dict[str, _Calls] = {}
    for _ in range(_NUM_RUNS):
        request = engine.stream(prompt, **settings)
        next(request)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in request:
                pass
        for event in profiler.key_averages():
            if event.key in _PRODUCTS or event.key.startswith("elastic_cache::"):
                known = best.get(event.key)
                total = event.self_cpu_time_total
                if known is None or total < known.total:
                    best[event.key] = _Calls(event.count, total)
    return best


def _hollow_settings(settings: GenerationConfig) -> dict[str, Any]:
    """One token a step, a full window or block all the time, and no refresh."""
    size = settings.block_length if settings.policy in ("prefix", "dual") else settings.window
    return dict(
        gen_length=size + _HOLLOW_STEPS,
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

    def random(rows: int) -> torch.Tensor:
        values = torch.randn(rows, width, generator=generator) / width**0.5
        return values.to(model.device, model.dtype)

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
