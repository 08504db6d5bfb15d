"""What is captured, when, and what is forgotten; with a capture that only remembers the work.

The capture itself, and that it changes no bit, is tested on a GPU (tests/e2e/test_cuda.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import elastic_cache
import pytest
import torch
from answering import spy, together
from elastic_cache.batch import Batch
from elastic_cache.engine import Engine
from elastic_cache.graphs import Graphs
from elastic_cache.request import Request
from elastic_cache.runner import BUCKET, MAX_CAPTURED_LENGTHS, Runner
from elastic_cache.types import Step

QUESTION = "Ava has 12 apples. Then Ava buys 30 more apples. How many apples does Ava have now?"


class Recorded:
    """In the place of a CUDA graph: does its work again when it is replayed."""

    def __init__(self, work: Callable[[], None], log: list[str]) -> None:
        self._work, self._log = work, log

    def replay(self) -> None:
        self._log.append("replay")
        self._work()


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What graphs do from here on."""
    entries: list[str] = []

    def capture(self: Graphs, function: Callable[[], None], stream: object) -> Any:
        entries.append("capture")
        return Recorded(function, entries)

    monkeypatch.setattr(Graphs, "_capture", capture)
    return entries


def make_graphs(most: int | None = None) -> Graphs:
    stream: Any = object()
    return Graphs(stream, most)


def test_the_second_run_is_captured_and_later_ones_replayed(log: list[str]) -> None:
    graphs, done = make_graphs(), []
    for _ in range(3):
        graphs.run(5, lambda: done.append(5))
    assert log == ["capture", "replay", "replay"] and done == [5] * 3
    graphs.run(6, lambda: done.append(6))
    assert len(log) == 3 and done[-1] == 6


def test_the_keys_run_last_are_kept(log: list[str]) -> None:
    graphs = make_graphs(most=2)

    def runs(*keys: int) -> list[str]:
        log.clear()
        for key in keys:
            graphs.run(key, lambda: None)
        return list(log)

    assert runs(1, 1, 2, 2) == ["capture", "replay"] * 2
    assert runs(1, 2, 1) == ["replay"] * 3
    assert runs(3) == []  # 2 is forgotten, 1 was run after it
    assert runs(1) == ["replay"]
    assert runs(2, 2) == ["capture", "replay"]


def engine_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, *, captures: bool) -> Engine:
    """An engine on the CPU with a GPU's padded row lists, and its way through the graphs."""
    stream: Any = object() if captures else None
    init = Runner.__init__

    def padded(self: Runner, *args: Any) -> None:
        init(self, *args)
        self._is_padded = True

    monkeypatch.setattr(Runner, "__init__", padded)
    monkeypatch.setattr("elastic_cache.engine.capture_stream", lambda device, capture: stream)
    return elastic_cache.load("tiny")


@pytest.mark.parametrize("policy", ["none", "dual", "elastic", "rolling"])
def test_requests_by_graphs_give_the_same_steps(
    policy: str, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dict(gen_length=24, policy=policy, gamma=2.0, block_length=8, trace=True)
    plain, captured = (engine_as_on_a_gpu(monkeypatch, captures=x) for x in (False, True))
    for _ in range(2):
        expected, got = (engine.generate(QUESTION, **settings) for engine in (plain, captured))
        assert got.trace == expected.trace and torch.equal(got.ids, expected.ids)
    assert log.count("replay") > 2


def test_a_full_pass_is_captured_once_per_length(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_as_on_a_gpu(monkeypatch, captures=True)
    steps = engine.generate(QUESTION, gen_length=24, policy="none").nfe
    # A pass, and the selection behind it; both are run once before they are captured.
    assert log == [*["capture", "replay"] * 2, *["replay"] * 2 * (steps - 2)]
    log.clear()
    steps = engine.generate(QUESTION, gen_length=24, policy="none").nfe
    assert log == ["replay"] * 2 * steps
    runner = engine._runners._idle[-1]
    assert len(runner._whole_graphs._graphs) == 1
    assert runner._whole_graphs._most == MAX_CAPTURED_LENGTHS


def test_only_the_window_pass_of_a_refreshed_step_is_a_graph(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers behind a failed test are launched one by one, and end as a graph of their own."""
    engine = engine_as_on_a_gpu(monkeypatch, captures=True)
    calls = spy(monkeypatch, Graphs, "run")
    out = engine.generate(QUESTION, gen_length=24, gamma=2.0, trace=True)
    assert out.trace is not None
    first, *rest = (key for _, key, _ in calls)
    assert first[:2] == (0, len(out.ids)) and rest.pop(0) == "select"
    windows = [-(-step.num_rows // BUCKET) * BUCKET for step in out.trace[1:]]
    assert [key[0] for key in rest[::3]] == windows
    assert all(key[:2] == ("end", 0) for key in rest[1::3])
    assert rest[2::3] == ["select"] * len(windows)


@pytest.mark.parametrize("captures", [False, True])
def test_a_batch_as_on_a_gpu_gives_the_steps_of_requests_alone(
    captures: bool, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded rows and candidates, graphs, and the next step launched before events are read."""
    kinds: list[dict[str, Any]] = [
        dict(),
        dict(policy="rolling", num_rows=32),
        dict(policy="none"),
        dict(gamma=0.99),
        dict(temperature=0.7, seed=1),
        dict(policy="rolling", num_rows=40, temperature=0.7, seed=2),
        dict(gamma=2.0, window=8),
        dict(policy="rolling", window=20),
    ]
    asked = [(f"{QUESTION} {'Think twice. ' * (i % 3)}", kind) for i, kind in enumerate(kinds)]
    # In the vendor's product a row may depend on how many there are.
    monkeypatch.setattr(torch, "mm", lambda a, b: torch.stack([row @ b for row in a]))
    engine = engine_as_on_a_gpu(monkeypatch, captures=captures)
    alone = [engine.generate(text, gen_length=32, trace=True, **kind) for text, kind in asked]
    log.clear()
    batch = engine.batch(3, max_length=160, max_full_rows=300)
    batch._runs_ahead = True
    answered = together(batch, [(text, dict(gen_length=32, **kind)) for text, kind in asked])
    for (request, steps), expected in zip(answered, alone, strict=True):
        assert expected.trace is not None
        assert torch.equal(request.result.ids, expected.ids)
        assert steps == expected.trace
    assert (log.count("replay") > 20) == captures


STEADY: list[dict[str, Any]] = [
    dict(policy="rolling", num_rows=32),
    dict(policy="rolling", num_rows=48, window=24),
    dict(policy="rolling", num_rows=40, factor=0.5),
    dict(policy="rolling", window=20, tokens_per_step=2),
]


@pytest.mark.parametrize("captures", [False, True])
def test_steps_launched_ahead_are_those_of_requests_alone(
    captures: bool, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests of steady rows join, finish, fail and are taken out while the next step is on its
    way; some that are not steady come between."""
    monkeypatch.setattr(torch, "mm", lambda a, b: torch.stack([row @ b for row in a]))
    engine = engine_as_on_a_gpu(monkeypatch, captures=captures)
    kinds = [*STEADY, *STEADY, dict(), *STEADY, dict(policy="rolling", temperature=0.5, seed=3)]
    asked = [
        (f"{QUESTION} {'Think twice. ' * (i % 3)}", dict(gen_length=32, **kind))
        for i, kind in enumerate(kinds)
    ]
    with monkeypatch.context() as patch:
        patch.setattr(Batch, "_foresees", lambda self: False)
        alone = [engine.generate(text, trace=True, **kind) for text, kind in asked]
    calls = spy(monkeypatch, Batch, "_launch_ahead")
    batch = engine.batch(3, max_length=160, max_full_rows=300)
    batch._runs_ahead = True
    steps: dict[Request, list[Step]] = {}
    waiting, running = list(range(len(asked))), dict[Request, int]()
    dice, num_steps, num_failed = random.Random(captures), 0, 0
    while waiting or running:
        num_steps += 1
        batch.wait()
        while waiting and batch.num_free and dice.random() < 0.8:
            text, kind = asked[waiting[0]]
            request = batch.add(text, **kind)
            steps[request], running[request] = [], waiting.pop(0)
        if num_steps in (7, 20, 41):
            request = dice.choice(list(running))
            batch.remove(request)
            waiting.append(running.pop(request))
        if num_steps in (12, 30):
            break_one(batch)
        for outcome in batch.step():
            index = running[outcome.request]
            if outcome.error is not None:
                waiting.append(running.pop(outcome.request))
                num_failed += 1
                continue
            assert outcome.step is not None
            steps[outcome.request].append(outcome.step)
            if outcome.is_over:
                assert steps[outcome.request] == alone[index].trace
                assert torch.equal(outcome.request.result.ids, alone[index].ids)
                del running[outcome.request]
    assert num_failed == 2
    assert len(calls) > num_steps // 3


def break_one(batch: Batch) -> None:
    """What the cache holds of a request that reuses it is no number any more."""
    lane = next(lane for lane, done in batch._launched.items() if not done.plan.is_full)
    cache = batch._runner._forward._cache
    with torch.inference_mode():
        cache.layers[0].v[lane * cache.capacity : (lane + 1) * cache.capacity].fill_(float("nan"))


def test_who_is_added_when_a_step_is_over_takes_part_in_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = engine_as_on_a_gpu(monkeypatch, captures=False).batch(2, max_length=160)
    batch._runs_ahead = True
    first = batch.add(QUESTION, gen_length=32)
    batch.step()  # and launches another
    batch.wait()
    second = batch.add(QUESTION, gen_length=32)
    assert [outcome.request for outcome in batch.step()] == [first]
    assert [outcome.request for outcome in batch.step() if outcome.step] == [first, second]


def test_who_fails_ahead_of_the_next_launch_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_as_on_a_gpu(monkeypatch, captures=False)
    alone = engine.generate(QUESTION, gen_length=32, trace=True)
    batch = engine.batch(2, max_length=160)
    batch._runs_ahead = True
    bad, good = (batch.add(QUESTION, gen_length=32) for _ in range(2))
    batch.step()
    with torch.inference_mode():
        batch._runner._forward._cache.layers[0].v[3].fill_(float("nan"))
    failed: list[Any] = []
    while batch.requests:
        failed += [outcome for outcome in batch.step() if outcome.error is not None]
    assert [outcome.request for outcome in failed] == [bad]
    assert isinstance(failed[0].error, elastic_cache.NonFiniteLogitsError)
    assert torch.equal(good.result.ids, alone.ids)


def test_a_captured_full_pass_is_the_same_for_every_policy(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that reuses the cache replays what `none` has captured: the pass must leave marked
    what it committed, which only the latter does not need."""
    engine = engine_as_on_a_gpu(monkeypatch, captures=True)
    batch, run, marked = engine.batch(1, max_length=160), Graphs.run, list[int]()

    def spy(self: Graphs, key: Any, function: Callable[[], None]) -> None:
        run(self, key, function)
        if self is batch._runner._whole_graphs:
            marked.append(int(batch._runner._state.committed.sum()))

    monkeypatch.setattr(Graphs, "run", spy)
    answered = together(batch, [(QUESTION, dict(policy="none", gen_length=32))])
    committed = [len(step.committed) for _, steps in answered for step in steps]
    assert marked == committed and min(marked) > 0
    assert not batch._runner._state.committed.any()
