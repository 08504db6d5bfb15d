"""Policy rolling: a fixed number of rows, those most due, and all of them is `none`."""

from __future__ import annotations

from itertools import pairwise

import elastic_cache
import pytest
import torch
from elastic_cache.engine import Engine
from elastic_cache.policies.rolling import RollingPolicy
from elastic_cache.types import Step

QUESTION = "Ava has 12 apples. Then Ava buys 30 more apples. How many apples does Ava have now?"
GEN_LENGTH = 64


@pytest.fixture(scope="module")
def engine() -> Engine:
    return elastic_cache.load("tiny")


def steps(engine: Engine, **settings: object) -> list[Step]:
    trace = engine.generate(QUESTION, gen_length=GEN_LENGTH, trace=True, **settings).trace
    assert trace is not None and len(trace) > 5
    return trace


@pytest.mark.parametrize(("window", "num_rows"), [(16, 16), (16, 40), (5, 23)])
def test_rows_of_a_step(engine: Engine, window: int, num_rows: int) -> None:
    """As many as asked for, unless window and newly committed positions alone are more."""
    trace = steps(engine, policy="rolling", window=window, num_rows=num_rows)
    fresh = 0
    for step in trace:
        if step.index > 0:
            must = min(window, step.num_masked + len(step.committed)) + fresh
            assert step.num_rows == max(num_rows, must)
            assert step.first_full_layer == engine.model.config.num_layers
        fresh = len(step.committed)


def test_what_is_computed_anew(engine: Engine) -> None:
    """What was just committed comes three times more, so do the masks behind the window, and no
    position is left out for good."""
    window, num_rows = 8, 64
    trace = steps(engine, policy="rolling", window=window, num_rows=num_rows)
    length = trace[0].num_rows
    last = dict.fromkeys(range(length), 0)
    masked = set(range(length - GEN_LENGTH, length))
    committed: list[list[int]] = []
    for step, after in pairwise(trace):
        masked = set(sorted(masked - set(step.committed))[: step.num_masked])  # EOS drops some
        needed = {*step.committed, *sorted(masked)[:window]}
        ahead = sorted(masked)[window : window + RollingPolicy.rolling.ahead]
        assert step.tracked == sorted(set(step.tracked)) and not set(step.tracked) & needed
        assert {*ahead, *sum(committed[-RollingPolicy.rolling.repeats :], [])} <= set(step.tracked)
        committed.append(step.committed)
        last |= dict.fromkeys([*step.tracked, *needed], after.index)
    assert min(last.values()) > 0


@pytest.mark.parametrize("num_rows", [1000, 10**9])
def test_all_rows_is_the_full_recompute(engine: Engine, num_rows: int) -> None:
    full = steps(engine, policy="none")
    rolling = steps(engine, policy="rolling", num_rows=num_rows)
    for one, other in zip(full, rolling, strict=True):
        assert (one.committed, one.tokens) == (other.committed, other.tokens)
        assert one.confidence == pytest.approx(other.confidence, abs=1e-4)


def test_a_runner_starts_anew(engine: Engine) -> None:
    """What is due of one request is not so of the next one."""
    settings = dict(policy="rolling", gen_length=GEN_LENGTH, num_rows=24, trace=True)
    first, again = (engine.generate(QUESTION, **settings) for _ in range(2))
    assert first.trace == again.trace and torch.equal(first.ids, again.ids)


def test_wrong_settings(engine: Engine) -> None:
    with pytest.raises(ValueError, match="num_rows must be at least the window of 16, got 15"):
        engine.generate(QUESTION, policy="rolling", num_rows=15)
    with pytest.raises(ValueError, match="num_rows must be at least 1, got 0"):
        engine.generate(QUESTION, num_rows=0)
    with pytest.raises(ValueError, match="block_caching=False works with policy elastic only"):
        engine.generate(QUESTION, policy="rolling", block_caching=False)
