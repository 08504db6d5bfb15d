"""Serving the embedded model: the same answers as alone, streamed, and ended in every way."""

from __future__ import annotations

import gc
import math
import queue
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import elastic_cache
import pytest
import torch
from elastic_cache.engine import Engine
from elastic_cache.service import (
    Event,
    Failed,
    Finished,
    Progress,
    QueueFullError,
    Service,
    ServiceClosedError,
    Started,
    Ticket,
)

POLICIES = ("elastic", "none", "rolling")
QUESTIONS = (
    "Ava has 12 apples. Then Ava buys 30 more apples. How many apples does Ava have now?",
    "Ben has 5 pens. Then Ben finds 8 more pens. How many pens does Ben have now?",
    "Eve has 40 coins. Then Eve gives half of the coins to a friend. How many coins does Eve "
    "have now?",
)
PATIENCE = 120.0
"""Seconds after which a test gives up; nothing waits for them to pass."""


@pytest.fixture(scope="module")
def engine() -> Engine:
    return elastic_cache.load("tiny", device="cpu", dtype="float32")


@pytest.fixture
def service(engine: Engine) -> Iterator[Service]:
    with Service(engine, num_lanes=2, max_queue=8) as service:
        yield service


class Inbox:
    """A ticket's events as they come.

    Args:
        ticket: whose.
        is_free: asked after each step until it is true, in the service's thread, which stands
            still meanwhile.
    """

    def __init__(self, ticket: Ticket, is_free: Callable[[], bool] = lambda: True) -> None:
        self.ticket = ticket
        self.events: list[Event] = []
        self._incoming: queue.Queue[Event] = queue.Queue()
        self._is_free = is_free
        ticket.listen(self._hear)

    def _hear(self, event: Event) -> None:
        self._incoming.put(event)
        while isinstance(event, Progress) and not self._is_free():
            time.sleep(0.001)

    def next(self) -> Event:
        self.events.append(self._incoming.get(timeout=PATIENCE))
        return self.events[-1]

    def wait_for(self, *kinds: type) -> Any:
        while not isinstance(event := self.next(), kinds):
            assert not isinstance(event, (Finished, Failed)), event
        return event

    def finished(self) -> Finished:
        end: Finished = self.wait_for(Finished)
        return end

    def text(self) -> str:
        """The deltas joined."""
        parts = [event.delta for event in self.events if isinstance(event, (Progress, Finished))]
        return "".join(parts)


@contextmanager
def standstill(service: Service) -> Iterator[None]:
    """Holds the service's thread, so that nothing is missed by who listens to it."""
    ticket = service.submit(QUESTIONS[0], gen_length=1)
    ticket.result()
    is_held, is_free = threading.Event(), threading.Event()

    def hold(event: Event) -> None:
        is_held.set()
        is_free.wait(PATIENCE)

    ticket.listen(hold)
    assert is_held.wait(PATIENCE)
    yield
    is_free.set()


@pytest.mark.parametrize("policy", POLICIES)
def test_answers_are_those_of_the_engine(engine: Engine, policy: str) -> None:
    """More than there are lanes, so that one joins when another leaves."""
    asked = [*zip(QUESTIONS, (24, 96, 64), strict=True), (QUESTIONS[0], 80)]
    cases = [(question, dict(gen_length=n, policy=policy)) for question, n in asked]
    alone = [engine.generate(question, **given, trace=True) for question, given in cases]
    with Service(engine, num_lanes=2, max_queue=len(cases)) as service:
        inboxes = [Inbox(service.submit(question, **given)) for question, given in cases]
        ends = [inbox.finished() for inbox in inboxes]
        stats = service.stats()
    for inbox, end, expected in zip(inboxes, ends, alone, strict=True):
        assert torch.equal(end.generation.ids, expected.ids)
        assert end.is_complete and end.generation.finish_reason == expected.finish_reason
        assert inbox.text() == end.generation.text == expected.text
        steps = [event.step for event in inbox.events if isinstance(event, Progress)]
        assert steps == expected.trace
        assert end.generation.nfe == expected.nfe
        timing = end.timing
        assert timing.first_token is not None
        assert 0 <= timing.queue < timing.first_token <= timing.total
        assert 0 < timing.step_p50 <= timing.step_p99 < timing.total
    assert {end.generation.finish_reason for end in ends} == {"eos", "length"}
    assert stats.num_finished == len(cases) and stats.num_running == stats.num_queued == 0
    assert stats.num_tokens == sum(out.num_tokens for out in alone)
    assert stats.num_steps < sum(out.nfe for out in alone)
    assert 0 < stats.busy_seconds


def test_policies_are_answered_side_by_side(engine: Engine) -> None:
    alone = [engine.generate(QUESTIONS[0], gen_length=32, policy=name).ids for name in POLICIES]
    with Service(engine, num_lanes=3) as service:
        tickets = [service.submit(QUESTIONS[0], gen_length=32, policy=name) for name in POLICIES]
        served = [ticket.result().generation.ids for ticket in tickets]
    for one, other in zip(served, alone, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("policy", POLICIES)
def test_any_text_is_streamed_exactly(engine: Engine, service: Service, policy: str) -> None:
    """At this temperature any token comes: halves of characters, special tokens, early ends."""
    given: dict[str, Any] = dict(gen_length=40, policy=policy, temperature=30.0, threshold=0.5)
    inboxes = [Inbox(service.submit(QUESTIONS[0], seed=seed, **given)) for seed in range(6)]
    texts = [inbox.finished().generation.text for inbox in inboxes]
    assert [inbox.text() for inbox in inboxes] == texts
    assert any("\ufffd" in text for text in texts if text is not None)


def test_a_stopped_answer_is_streamed_exactly(service: Service) -> None:
    for max_steps in (1, 5, 9):
        inbox = Inbox(service.submit(QUESTIONS[0], gen_length=64, max_steps=max_steps))
        answer = inbox.finished().generation
        assert (answer.finish_reason, answer.nfe) == ("steps", max_steps)
        assert answer.text and inbox.text() == answer.text
        assert service._engine.model.config.mask_id in answer.ids.tolist()


def test_infilling(engine: Engine, service: Service) -> None:
    ids = engine.generate(QUESTIONS[0], gen_length=96).ids.clone()
    gaps = [len(ids) - 90, len(ids) - 88, len(ids) - 87]
    ids[gaps] = engine.model.config.mask_id
    inbox = Inbox(service.submit(ids, gen_length=0))
    end = inbox.finished()
    expected = engine.generate(ids, gen_length=0)
    assert torch.equal(end.generation.ids, expected.ids)
    assert inbox.text() == end.generation.text == expected.text
    first = inbox.events[0]
    assert isinstance(first, Started) and first.prompt_tokens == len(ids)


def test_prompt_forms_agree(service: Service) -> None:
    chat: Any = [{"role": "user", "content": QUESTIONS[1]}]
    text, messages = (service.submit(p, gen_length=24) for p in (QUESTIONS[1], chat))
    answer = text.result().generation
    assert torch.equal(answer.ids, messages.result().generation.ids)
    ids = answer.ids[:-24]
    assert torch.equal(service.submit(ids, gen_length=24).result().generation.ids, answer.ids)


def test_cancel_deadline_and_priority(engine: Engine) -> None:
    all_in = threading.Event()
    with Service(engine, num_lanes=1, max_queue=4) as service:
        with standstill(service):
            long = Inbox(service.submit(QUESTIONS[0], gen_length=96), all_in.is_set)
        long.wait_for(Progress)
        low, high = (
            Inbox(service.submit(QUESTIONS[1], gen_length=16, priority=priority))
            for priority in (0, 1)
        )
        expired = service.submit(QUESTIONS[1], gen_length=16, deadline=0.0)
        cancelled = service.submit(QUESTIONS[1], gen_length=16)
        with pytest.raises(QueueFullError):
            service.submit(QUESTIONS[0], gen_length=16)
        cancelled.cancel()
        long.ticket.cancel()
        all_in.set()
        end = long.finished()
        assert (end.generation.finish_reason, end.is_complete) == ("cancelled", False)
        assert end.generation.text == long.text()
        first, second = high.finished(), low.finished()
        assert first.is_complete and second.is_complete
        assert first.timing.queue < second.timing.queue
        for ticket, reason in ((expired, "deadline"), (cancelled, "cancelled")):
            answer = ticket.result().generation
            assert (answer.finish_reason, answer.text, answer.nfe) == (reason, "", 0)
            assert answer.ids.tolist().count(engine.model.config.mask_id) == 16
        stats = service.stats()
        assert (stats.num_cancelled, stats.num_incomplete, stats.num_finished) == (2, 1, 3)
        assert stats.num_rejected == 1


def test_a_running_deadline_keeps_what_there_is(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def pass_two_seconds() -> bool:
        now[0] += 2.0
        return True

    monkeypatch.setattr("elastic_cache.service.time", SimpleNamespace(monotonic=lambda: now[0]))
    with standstill(service):
        ticket = service.submit(QUESTIONS[0], gen_length=64, deadline=9.0)
        inbox = Inbox(ticket, pass_two_seconds)
    end = inbox.finished()
    assert end.generation.finish_reason == "deadline" and not end.is_complete
    assert end.generation.nfe == 5 and end.timing.total == 10.0
    assert end.generation.text and inbox.text() == end.generation.text


def test_a_failing_request_leaves_the_service_usable() -> None:
    engine = elastic_cache.load("tiny")
    good = engine.generate(QUESTIONS[0], gen_length=16).ids
    norm = engine.model.weights.final_norm
    kept = norm.clone()
    with Service(engine) as service:
        norm[3] = math.nan
        with pytest.raises(elastic_cache.NonFiniteLogitsError, match="not finite numbers"):
            service.submit(QUESTIONS[0], gen_length=16).result()
        norm.copy_(kept)
        end = service.submit(QUESTIONS[0], gen_length=16).result()
        assert torch.equal(end.generation.ids, good)
        assert service.stats().num_failed == 1


def test_close_while_running(engine: Engine) -> None:
    service = Service(engine, num_lanes=1)
    with standstill(service):
        ticket = service.submit(QUESTIONS[0], gen_length=96)
        running = Inbox(ticket, lambda: service._close_at is not None)
    running.wait_for(Progress)
    waiting = service.submit(QUESTIONS[0], gen_length=16)
    service.close(seconds=0.0)
    assert running.finished().generation.finish_reason == "cancelled"
    with pytest.raises(ServiceClosedError):
        waiting.result()
    with pytest.raises(ServiceClosedError):
        service.submit(QUESTIONS[0], gen_length=16)


def test_a_program_that_forgets_to_close_ends_well() -> None:
    program = (
        "import elastic_cache\n"
        "from elastic_cache.service import Service\n"
        "service = Service(elastic_cache.load('tiny'))\n"
        "ticket = service.submit('Ava has 3 pens.', gen_length=1500, policy='none')\n"
        "print(type(next(ticket.events())).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "Started\n", "")


@pytest.mark.parametrize(
    ("prompt", "given", "sentence"),
    [
        ("", {}, "the prompt is empty"),
        ([5, 10**6], {}, "prompt ids must be between 0 and 767"),
        ([5] * 5000, {}, "takes at most 4096"),
        ([5], {"gama": 1}, "there is no setting 'gama': did you mean gamma?"),
        ([5], {"threshold": 2.0}, "threshold must be between 0 and 1"),
        ([5], {"policy": "dual"}, "policy 'dual' decodes one request at a time"),
        ([5], {"policy": "prefix"}, "elastic, rolling or none"),
        ([5], {"priority": 0.5}, "priority must be a whole number, got 0.5"),
        ([5], {"deadline": -1}, "deadline must be a number of seconds, at least 0, got -1"),
        ([5], {"deadline": float("nan")}, "deadline must be a number of seconds"),
        ([5], {"deadline": "soon"}, "deadline must be a number of seconds"),
        ([5], {"max_steps": 0}, "max_steps must be a whole number, at least 1, got 0"),
        ([5], {"max_steps": True}, "max_steps must be a whole number, at least 1, got True"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_before_queueing(
    service: Service, prompt: Any, given: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError) as caught:
        service.submit(prompt, **{"gen_length": 4, **given})
    assert sentence in str(caught.value)
    stats = service.stats()
    assert (stats.num_queued, stats.num_running, stats.num_failed) == (0, 0, 0)


@pytest.mark.parametrize("sizes", [{"num_lanes": 0}, {"max_queue": -1}, {"max_full_rows": 0}])
def test_wrong_sizes_are_refused(engine: Engine, sizes: dict[str, int]) -> None:
    ((name, value),) = sizes.items()
    with pytest.raises(ValueError, match=f"{name} must be at least {value + 1}, got {value}"):
        Service(engine, **sizes)


def test_a_closed_service_holds_no_memory(engine: Engine) -> None:
    service = Service(engine, num_lanes=2, max_length=256)
    service.submit(QUESTIONS[0], gen_length=16).result()
    assert service._batch is not None
    runner = weakref.ref(service._batch._runner)
    service.close()
    gc.collect()
    assert runner() is None
