"""The service around a batch that does as the test says: order, limits, failures, its end."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
from elastic_cache.engine import Engine
from elastic_cache.service import (
    Event,
    Finished,
    Progress,
    QueueFullError,
    Service,
    ServiceClosedError,
    Started,
    Stats,
)
from servicecase import (
    MASK_ID,
    PATIENCE,
    Clock,
    FakeBatch,
    Gate,
    Inbox,
    Script,
    ask,
    close,
    fake_engine,
)


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def gate(script: Script) -> Iterator[Gate]:
    gate = Gate()
    script.before_step = gate
    yield gate
    gate.open()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("elastic_cache.service.time", clock)
    return clock


@pytest.fixture
def engine(script: Script, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr("elastic_cache.service.Batch", FakeBatch)
    return fake_engine(script)


@pytest.fixture
def start(engine: Engine) -> Iterator[Callable[..., Service]]:
    """Makes services and closes them; after `gate`, so that a test which fails cannot hang."""
    services: list[Service] = []

    def make(**sizes: int) -> Service:
        services.append(Service(engine, **sizes))
        return services[-1]

    yield make
    cast(Any, engine).script.before_step = lambda: None
    for service in services:
        service._stop_accepting(0.0)
        service._thread.join(PATIENCE)


A, B, C, D, E, F = range(70, 76)


def test_a_request_from_submission_to_its_end(start: Any, engine: Any, script: Script) -> None:
    ticket = ask(start(), A, gen_length=4)
    events = list(ticket.events())
    kinds = [type(event) for event in events]
    assert kinds == [Started] + [Progress] * 4 + [Finished]
    letter = engine.model.tokenizer.decode([A])
    assert letter
    progress = [event for event in events if isinstance(event, Progress)]
    assert [event.delta for event in progress] == [letter] * 4
    assert [event.provisional for event in progress] == ["░" * left for left in (3, 2, 1, 0)]
    assert [event.step.index for event in progress] == [0, 1, 2, 3]
    assert isinstance(events[0], Started) and events[0].prompt_tokens == 3
    end = ticket.result()
    assert end is events[-1] and end.is_complete
    assert end.delta == "" and end.generation.text == letter * 4
    assert end.generation.settings["gen_length"] == 4
    assert list(ticket.events()) == []
    assert script.added == [A]


def test_lanes_are_shared_and_joined_between_steps(start: Any, gate: Gate, script: Script) -> None:
    service = start(num_lanes=2)
    first = Inbox(ask(service, A, gen_length=3))
    gate.wait()
    second, third = Inbox(ask(service, B, gen_length=1)), Inbox(ask(service, C, gen_length=1))
    gate.open()
    for inbox in (first, second, third):
        assert inbox.finished().is_complete
    assert script.stepped == [[A], [A, B], [A, C]]
    assert script.num_made == 1


def test_who_asks_while_a_step_is_under_way_joins_the_next(start: Any, script: Script) -> None:
    service, inboxes = start(num_lanes=2), []

    def ask_once() -> None:
        script.under_way = lambda: None
        inboxes.append(Inbox(ask(service, B, gen_length=1)))

    script.under_way = ask_once
    assert Inbox(ask(service, A, gen_length=2)).finished().is_complete
    assert inboxes[0].finished().is_complete
    assert script.stepped == [[A, B], [A]]


def test_the_highest_priority_goes_first_and_equals_in_order(
    start: Any, gate: Gate, script: Script
) -> None:
    service = start(num_lanes=1)
    inboxes = [Inbox(ask(service, A))]
    gate.wait()
    for name, priority in ((B, 0), (C, 5), (D, 5), (E, -1), (F, 0)):
        inboxes.append(Inbox(ask(service, name, priority=priority)))
    gate.open()
    for inbox in inboxes:
        inbox.finished()
    assert script.added == [A, C, D, B, F, E]


def test_a_full_queue_refuses(start: Any, gate: Gate) -> None:
    service = start(num_lanes=1, max_queue=1)
    # No need to wait: what a free lane is there for does not count as waiting.
    inboxes = [Inbox(ask(service, A)), Inbox(ask(service, B))]
    with pytest.raises(QueueFullError, match="1 requests are waiting, and no more may"):
        ask(service, C)
    assert service.stats().num_rejected == 1
    gate.open()
    for inbox in inboxes:
        inbox.finished()
    assert Inbox(ask(service, D)).finished().is_complete


def test_without_a_queue_only_free_lanes_take_requests(start: Any, gate: Gate) -> None:
    service = start(num_lanes=1, max_queue=0)
    inbox = Inbox(ask(service, A))
    with pytest.raises(QueueFullError):
        ask(service, B)
    gate.open()
    assert inbox.finished().is_complete


def test_cancelled_while_queued(start: Any, gate: Gate, script: Script) -> None:
    service = start(num_lanes=1)
    running = Inbox(ask(service, A))
    gate.wait()
    ticket = ask(service, B, gen_length=5)
    waiting = Inbox(ticket)
    ticket.cancel()
    gate.open()
    end = waiting.finished()
    assert waiting.kinds() == ["Finished"] and not end.is_complete
    answer = end.generation
    assert answer.ids.tolist() == [B, 10, 11] + [MASK_ID] * 5
    assert (answer.text, answer.num_tokens, answer.nfe) == ("", 0, 0)
    assert (answer.finish_reason, end.delta) == ("cancelled", "")
    assert answer.settings["gen_length"] == 5 and answer.settings["policy"] == "elastic"
    assert (end.timing.first_token, end.timing.step_p50, end.timing.step_p99) == (None, 0, 0)
    assert end.timing.queue == end.timing.total
    assert running.finished().is_complete and script.added == [A]
    assert service.stats().num_cancelled == 1


def test_cancelled_while_running_its_lane_is_free_in_the_next_step(
    start: Any, gate: Gate, script: Script
) -> None:
    service = start(num_lanes=2)
    ticket = ask(service, A, gen_length=9)
    running = Inbox(ticket)
    gate.wait()
    beside = Inbox(ask(service, C, gen_length=9))
    gate.open(1)
    gate.wait()
    waiting = Inbox(ask(service, B))
    ticket.cancel()
    gate.open()
    end = running.finished()
    assert end.generation.finish_reason == "cancelled" and end.generation.nfe == 2
    assert running.kinds() == ["Started", "Progress", "Progress", "Finished"]
    assert waiting.finished().is_complete and beside.finished().is_complete
    assert script.stepped[:3] == [[A], [A, C], [C, B]]
    ticket.cancel()  # harmless now
    assert ticket.result() is end
    assert service.stats().num_cancelled == 1


def test_a_deadline_ends_what_runs(start: Any, gate: Gate, clock: Clock) -> None:
    service = start()
    inbox = Inbox(ask(service, A, gen_length=9, deadline=5.0))
    gate.wait()
    clock.now += 4.9
    gate.open(1)
    gate.wait()
    clock.now += 0.2
    gate.open()
    end = inbox.finished()
    assert end.generation.finish_reason == "deadline" and end.generation.nfe == 2
    assert not end.is_complete and service.stats().num_incomplete == 1
    assert end.timing.total == pytest.approx(5.1)


def test_a_deadline_ends_what_waits(start: Any, gate: Gate, clock: Clock, script: Script) -> None:
    service = start(num_lanes=1)
    running = Inbox(ask(service, A, gen_length=9))
    gate.wait()
    waiting = Inbox(ask(service, B, deadline=5.0))
    clock.now += 5.0
    gate.open(1)
    end = waiting.finished()
    assert waiting.kinds() == ["Finished"]
    assert (end.generation.finish_reason, end.generation.nfe) == ("deadline", 0)
    assert end.timing.queue == end.timing.total == pytest.approx(5.0)
    gate.open()
    assert running.finished().is_complete and script.added == [A]


@pytest.mark.parametrize(("max_steps", "reason"), [(1, "steps"), (3, "steps"), (4, "length")])
def test_max_steps(start: Any, max_steps: int, reason: str) -> None:
    service = start()
    inbox = Inbox(ask(service, A, gen_length=4, max_steps=max_steps))
    end = inbox.finished()
    assert (end.generation.finish_reason, end.generation.nfe) == (reason, max_steps)
    assert inbox.kinds().count("Progress") == max_steps
    assert service.stats().num_incomplete == (reason == "steps")


def test_an_answer_complete_at_its_deadline_is_complete(
    start: Any, gate: Gate, clock: Clock
) -> None:
    inbox = Inbox(ask(start(), A, gen_length=1, deadline=5.0))
    gate.wait()
    clock.now += 6.0
    gate.open()
    assert inbox.finished().generation.finish_reason == "length"


def test_timing(start: Any, gate: Gate, clock: Clock) -> None:
    service = start(num_lanes=1)
    first = Inbox(ask(service, A, gen_length=1))
    gate.wait()
    clock.now += 1.0
    second = Inbox(ask(service, B, gen_length=4))
    clock.now += 1.0
    gate.open(1)
    for seconds in (3.0, 4.0, 2.0, 7.0):
        gate.wait()
        clock.now += seconds
        gate.open(1)
    gate.open()
    timing = first.finished().timing
    assert (timing.queue, timing.first_token, timing.total) == (0.0, 2.0, 2.0)
    timing = second.finished().timing
    assert (timing.queue, timing.first_token, timing.total) == (1.0, 4.0, 17.0)
    assert (timing.step_p50, timing.step_p99) == (3.0, 7.0)
    stats = service.stats()
    assert (stats.num_steps, stats.busy_seconds, stats.num_tokens) == (5, 18.0, 5)


def test_a_failed_step_fails_what_runs_and_nothing_else(
    start: Any, gate: Gate, script: Script
) -> None:
    service = start(num_lanes=2)
    running = [Inbox(ask(service, name)) for name in (A, B)]
    gate.wait()
    waiting = Inbox(ask(service, C))
    broken = RuntimeError("the device is gone")

    def fail() -> None:
        script.before_step = lambda: None
        raise broken

    script.before_step = fail
    gate.open()
    errors = [inbox.failed() for inbox in running]
    assert errors == [broken, broken] and broken.__traceback__ is None
    assert waiting.finished().is_complete
    assert script.num_made == 2 and script.added[-1] == C
    stats = service.stats()
    assert (stats.num_failed, stats.num_finished, stats.num_running) == (2, 1, 0)


def test_a_batch_that_cannot_be_made_anew_fails_the_request_it_is_for(
    start: Any, script: Script
) -> None:
    service = start()

    def fail() -> None:
        script.before_step = lambda: None
        script.broken = MemoryError("no room for a batch")
        raise RuntimeError("the device is gone")

    script.before_step = fail
    assert str(Inbox(ask(service, A)).failed()) == "the device is gone"
    assert str(Inbox(ask(service, B)).failed()) == "no room for a batch"
    assert Inbox(ask(service, C)).finished().is_complete


def test_a_failed_request_fails_alone(start: Any, gate: Gate, script: Script) -> None:
    service = start(num_lanes=2)
    script.errors[B, 2] = ArithmeticError("not a number")
    tickets = [ask(service, name, gen_length=5) for name in (A, B)]
    good, bad = (Inbox(ticket) for ticket in tickets)
    gate.open()
    assert bad.failed() is script.errors[B, 2]
    with pytest.raises(ArithmeticError, match="not a number"):
        tickets[1].result()
    assert good.finished().generation.num_tokens == 5
    assert bad.kinds() == ["Started", "Progress", "Progress", "Failed"]
    assert script.num_made == 1 and service.stats().num_failed == 1


def test_a_request_that_the_batch_refuses_fails_alone(start: Any, script: Script) -> None:
    service = start()
    script.refused.add(A)
    refused, good = Inbox(ask(service, A)), Inbox(ask(service, B))
    assert str(refused.failed()) == f"{A} is refused"
    assert refused.kinds() == ["Failed"]
    assert good.finished().is_complete


def test_a_listener_that_raises_is_dropped_and_its_request_cancelled(
    start: Any, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    service = start(num_lanes=2)
    heard: list[Event] = []

    def listener(event: Event) -> None:
        heard.append(event)
        if isinstance(event, Progress):
            raise KeyError("a mistake")

    ticket = ask(service, A, gen_length=9)
    ticket.listen(listener)
    other = Inbox(ask(service, B, gen_length=9))
    gate.open()
    assert other.finished().is_complete
    end = ticket.result()
    assert end.generation.finish_reason == "cancelled" and end.generation.nfe == 1
    assert [type(event) for event in heard] == [Started, Progress]
    assert "a listener raised" in caplog.text
    assert Inbox(ask(service, C)).finished().is_complete


def test_listeners_may_use_the_service(start: Any, gate: Gate, script: Script) -> None:
    service = start(num_lanes=1)
    done: queue.Queue[Any] = queue.Queue()

    def listener(event: Event) -> None:
        if isinstance(event, Progress):
            ticket.cancel()
        if isinstance(event, Finished):
            done.put((service.stats(), Inbox(ask(service, B))))

    ticket = ask(service, A, gen_length=9)
    ticket.listen(listener)
    gate.open()
    stats, inbox = done.get(timeout=PATIENCE)
    # Whoever is told of an end finds it counted.
    assert stats.num_cancelled == 1 and stats.num_running == 0
    assert inbox.finished().is_complete and script.added == [A, B]


def test_a_late_listener_hears_everything_from_the_thread(start: Any) -> None:
    service = start()
    ticket = ask(service, A)
    ticket.result()
    threads: list[threading.Thread] = []
    heard: queue.Queue[Event] = queue.Queue()
    ticket.listen(lambda event: (threads.append(threading.current_thread()), heard.put(event))[1])
    kinds = [type(heard.get(timeout=PATIENCE)) for _ in range(5)]
    assert kinds == [Started] + [Progress] * 3 + [Finished]
    assert set(threads) == {service._thread}


def test_a_listener_after_the_close_hears_everything(start: Any) -> None:
    service = start()
    ticket = ask(service, A)
    ticket.result()
    service.close()
    heard: list[Event] = []
    ticket.listen(heard.append)
    assert [type(event) for event in heard] == [Started] + [Progress] * 3 + [Finished]


def test_close_lets_what_runs_finish_and_fails_what_waits(
    start: Any, gate: Gate, script: Script
) -> None:
    service = start(num_lanes=1)
    running = Inbox(ask(service, A, gen_length=4))
    gate.wait()
    waiting = Inbox(ask(service, B))
    closing = close(service, PATIENCE)
    gate.open()
    closing.join(PATIENCE)
    assert not closing.is_alive() and not service._thread.is_alive()
    assert running.finished().is_complete
    error = waiting.failed()
    assert isinstance(error, ServiceClosedError) and "while the request waited" in str(error)
    assert script.added == [A]
    service.close()  # again, harmless


def test_close_ends_what_takes_too_long(start: Any, gate: Gate, clock: Clock) -> None:
    service = start()
    inbox = Inbox(ask(service, A, gen_length=9))
    gate.wait()
    closing = close(service, 2.0)
    gate.open(1)
    gate.wait()
    clock.now += 2.0
    gate.open()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    end = inbox.finished()
    assert (end.generation.finish_reason, end.generation.nfe) == ("cancelled", 2)


def test_leaving_the_context_closes(engine: Engine) -> None:
    with Service(engine) as service:
        inbox = Inbox(ask(service, A, gen_length=50))
        inbox.next()  # it has started
    assert inbox.finished().is_complete
    assert not service._thread.is_alive()
    with pytest.raises(ServiceClosedError, match="accepts no requests"):
        ask(service, B)


def test_every_request_is_in_one_place_at_any_moment(
    start: Any, gate: Gate, script: Script
) -> None:
    service, num_requests = start(num_lanes=3), 40
    script.errors[A, 1] = ValueError("no")
    tickets = [ask(service, A if i % 4 == 0 else B, max_steps=1 + i % 5) for i in range(40)]
    gate.open()
    seen: list[Stats] = []
    while not seen or seen[-1].num_queued + seen[-1].num_running:
        seen.append(service.stats())
    for stats in seen:
        ended = stats.num_finished + stats.num_failed + stats.num_incomplete
        assert stats.num_queued + stats.num_running + ended == num_requests
    assert ended == num_requests and stats.num_cancelled == 0
    finished = [t.result() for i, t in enumerate(tickets) if i % 4 and i % 5 >= 2]
    assert stats.num_finished == len(finished) and stats.num_tokens == 3 * len(finished)


def test_an_idle_service_does_nothing(start: Any, clock: Clock) -> None:
    """It would look at the clock if it went round."""
    service = start()
    Inbox(ask(service, A)).finished()
    looks = clock.num_looks
    assert looks > 0
    service._thread.join(0.3)
    assert service._thread.is_alive() and clock.num_looks == looks


def test_what_is_submitted_is_what_is_answered(start: Any, gate: Gate, script: Script) -> None:
    service = start(num_lanes=1)
    running = Inbox(ask(service, A))
    gate.wait()
    prompt = [B, 10, 11]
    inbox = Inbox(service.submit(prompt, gen_length=1))
    prompt[0] = C
    gate.open()
    assert inbox.finished().generation.ids.tolist() == [B, 10, 11, B]
    assert running.finished().is_complete and script.added == [A, B]
