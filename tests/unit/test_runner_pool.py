"""Runners are kept for later requests, and go first when a GPU has no room."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import elastic_cache
import pytest
import torch
from elastic_cache import engine as engine_module
from elastic_cache.config import GenerationConfig
from elastic_cache.engine import Engine, runner_shape
from elastic_cache.memory import SCRATCH_BYTES
from elastic_cache.policies import make_policy
from elastic_cache.request import Request
from elastic_cache.runner import Runner

QUESTION = [5, 6, 7, 8]
LONG_QUESTION = "Ben has 5 pens. Then Ben finds 8 more pens. How many pens does Ben have now?"
"""Not answered in one step."""


def runner_of(request: Request) -> Runner:
    return request._advance.__self__._runner


@pytest.fixture
def engine() -> Engine:
    return elastic_cache.load("tiny")


def test_a_finished_request_lends_its_runner_to_the_next_of_its_shape(engine: Engine) -> None:
    first = engine.stream(QUESTION, gen_length=12)
    list(first)
    second = engine.stream(QUESTION, gen_length=12)
    assert runner_of(second) is runner_of(first)
    assert runner_of(engine.stream(QUESTION, gen_length=12)) is not runner_of(first)
    assert runner_of(engine.stream(QUESTION, gen_length=13)) is not runner_of(first)


@pytest.mark.parametrize("policy", ["none", "prefix", "dual", "elastic", "rolling"])
def test_on_a_gpu_prompts_of_other_lengths_have_the_same_shape(engine: Engine, policy: str) -> None:
    """Else each would capture its steps anew."""
    model: Any = SimpleNamespace(device=torch.device("cuda"), config=engine.model.config)
    settings = GenerationConfig(policy=policy, gen_length=64)

    def shape_for(prompt: int) -> object:
        masked = [False] * prompt + [True] * 64
        plan = make_policy(masked, settings, model.config.eos_id)
        return runner_shape(model, plan, settings, len(masked))

    assert shape_for(40) == shape_for(43) == shape_for(192)
    assert shape_for(193) != shape_for(192)  # 257 positions


def test_a_runner_that_was_used_before_gives_the_same_answer(engine: Engine) -> None:
    settings = dict(gen_length=40, trace=True, gamma=0.97)
    fresh = [engine.generate([*QUESTION, token], **settings) for token in (9, 10)]
    again = engine.generate([*QUESTION, 9], **settings)
    assert again.trace == fresh[0].trace
    assert torch.equal(again.ids, fresh[0].ids)


def test_an_abandoned_request_keeps_its_runner(engine: Engine) -> None:
    abandoned = engine.stream(LONG_QUESTION, gen_length=12)
    next(abandoned)
    assert runner_of(engine.stream(LONG_QUESTION, gen_length=12)) is not runner_of(abandoned)


def test_an_abandoned_request_frees_its_memory_at_once(engine: Engine) -> None:
    """Without waiting for the garbage collector, which does not know how large a runner is."""
    abandoned = engine.stream(LONG_QUESTION, gen_length=12)
    next(abandoned)
    runner = weakref.ref(runner_of(abandoned))
    gc.disable()
    try:
        del abandoned
        assert runner() is None
    finally:
        gc.enable()


def test_idle_runners_go_when_the_gpu_has_no_room(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.generate(QUESTION, gen_length=12)
    asked: list[int] = []

    def check_memory(device: torch.device, num_bytes: int, what: str, advice: str) -> None:
        asked.append(num_bytes)
        if engine._runners._idle or len(asked) > 2:
            raise ValueError(f"{what} need too much: {advice}")

    monkeypatch.setattr(engine_module, "check_memory", check_memory)
    engine.generate(QUESTION, gen_length=30)
    assert len(asked) == 2 and asked[0] == asked[1] > SCRATCH_BYTES
    engine._runners._idle.clear()
    with pytest.raises(ValueError, match="buffers of this request need too much: shorten"):
        engine.generate(QUESTION, gen_length=60)
