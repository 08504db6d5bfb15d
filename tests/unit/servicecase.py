"""A batch that does as a test of the service says, and means to wait without guessing times."""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import elastic_cache
import torch
from elastic_cache.batch import Outcome
from elastic_cache.config import GenerationConfig
from elastic_cache.engine import Engine
from elastic_cache.models.tokenizer import load_tokenizer
from elastic_cache.policies import Policy
from elastic_cache.prompt import Prompt
from elastic_cache.service import Event, Failed, Finished, Service, Ticket
from elastic_cache.types import Generation, Step

MASK_ID = 2
PATIENCE = 60.0
"""Seconds after which a test gives up; nothing waits for them to pass."""


class FakeRequest:
    """Commits one token a step, from left to right: the first one of its prompt."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], settings: dict[str, Any]) -> None:
        self.name = prompt[0]
        self.settings = settings
        self._decode = tokenizer.decode
        self._num_prompt = len(prompt)
        self._ids = list(prompt) + [MASK_ID] * settings["gen_length"]
        self._num_steps = 0
        self._result: Generation | None = None

    @property
    def is_finished(self) -> bool:
        return self._result is not None

    @property
    def result(self) -> Generation:
        assert self._result is not None
        return self._result

    def step(self) -> Step | None:
        position = self._ids.index(MASK_ID)
        self._ids[position] = self.name
        self._num_steps += 1
        left = self._ids.count(MASK_ID)
        if not left:
            self.stop("length")
        return Step(self._num_steps - 1, 0, [position], [self.name], [1.0], [], [], 1, left)

    def stop(self, reason: str) -> Generation:
        answer = [token for token in self._ids[self._num_prompt :] if token != MASK_ID]
        text = self._decode(answer)
        ids = torch.tensor(self._ids)
        steps = self._num_steps
        self._result = Generation(ids, text, len(answer), steps, 0.0, 0.0, reason, self.settings)
        return self._result


class Script:
    """What the batches do, and what they were asked for.

    Attributes:
        before_step: called inside every step, before anything happens: may wait, or raise.
        under_way: called whenever the service waits for the step under way.
        errors: raised by the request of that name, at its step of that number.
        added, stepped: names in the order of `begin`; those of every step.
        num_made: batches made.
        refused: names which `begin` refuses.
        broken: raised instead of making a batch, once.
    """

    def __init__(self) -> None:
        self.before_step: Callable[[], None] = lambda: None
        self.under_way: Callable[[], None] = lambda: None
        self.errors: dict[tuple[int, int], Exception] = {}
        self.added: list[int] = []
        self.stepped: list[list[int]] = []
        self.num_made = 0
        self.refused: set[int] = set()
        self.broken: Exception | None = None


class FakeBatch:
    max_length = 4096

    def __init__(self, script: Script, tokenizer: Any, num_lanes: int) -> None:
        self._script = script
        self._tokenizer = tokenizer
        self._num_lanes = num_lanes
        self._requests: list[FakeRequest] = []
        if self._script.broken is not None:
            error, self._script.broken = self._script.broken, None
            raise error
        self._script.num_made += 1

    @property
    def num_free(self) -> int:
        return self._num_lanes - len(self._requests)

    def check(self, prompt: Prompt, settings: GenerationConfig, policy: Policy) -> None:
        pass

    def begin(self, prompt: Prompt, settings: GenerationConfig, policy: Policy) -> FakeRequest:
        assert self.num_free > 0
        ids = prompt.ids[~prompt.masked].tolist()
        if ids[0] in self._script.refused:
            raise ValueError(f"{ids[0]} is refused")
        request = FakeRequest(self._tokenizer, ids, dataclasses.asdict(settings))
        self._requests.append(request)
        self._script.added.append(request.name)
        return request

    def wait(self) -> None:
        self._script.under_way()

    def step(self) -> list[Outcome]:
        self._script.stepped.append([request.name for request in self._requests])
        self._script.before_step()
        outcomes = []
        for request in list(self._requests):
            error = self._script.errors.get((request.name, request._num_steps))
            step = request.step() if error is None else None
            outcomes.append(Outcome(cast(Any, request), step, error))
            if outcomes[-1].is_over:
                self._requests.remove(request)
        return outcomes

    def remove(self, request: FakeRequest) -> None:
        self._requests.remove(request)


def fake_engine(script: Script) -> Engine:
    """As much of an engine as the service looks at; the tokenizer is the embedded model's."""
    tokenizer = load_tokenizer(Path(elastic_cache.__file__).parent / "data/tiny-llada")
    config = SimpleNamespace(eos_id=1, mask_id=MASK_ID, vocab_size=768, max_length=4096)
    model = SimpleNamespace(name="fake", tokenizer=tokenizer, config=config)

    def batch(num_lanes: int, max_length: int | None, max_full_rows: int) -> FakeBatch:
        return FakeBatch(script, tokenizer, num_lanes)

    return cast(Engine, SimpleNamespace(model=model, script=script, batch=batch))


def ask(service: Service, name: int, gen_length: int = 3, **limits: Any) -> Ticket:
    """A request that answers with the token `name`, so many times."""
    return service.submit([name, 10, 11], gen_length=gen_length, **limits)


def close(service: Service, seconds: float) -> threading.Thread:
    """Closes in another thread; returns when the service takes nothing more."""
    thread = threading.Thread(target=service.close, args=(seconds,), daemon=True)
    thread.start()
    while service._close_at is None:
        time.sleep(0.001)
    return thread


class Gate:
    """Lets as many steps happen as it is told to; closed until then."""

    def __init__(self) -> None:
        self._passes = threading.Semaphore(0)
        self._arrived = threading.Semaphore(0)

    def __call__(self) -> None:
        self._arrived.release()
        assert self._passes.acquire(timeout=PATIENCE)

    def wait(self) -> None:
        """Until a step stands before it."""
        assert self._arrived.acquire(timeout=PATIENCE)

    def open(self, num_steps: int = 1000) -> None:
        self._passes.release(num_steps)


class Clock:
    """Seconds that pass when the test says so; counts how often it is looked at."""

    def __init__(self) -> None:
        self.now = 100.0
        self.num_looks = 0

    def monotonic(self) -> float:
        self.num_looks += 1
        return self.now


class Inbox:
    """Collects a ticket's events; `end` waits for the last of them."""

    def __init__(self, ticket: Ticket) -> None:
        self.events: list[Event] = []
        self._incoming: queue.Queue[Event] = queue.Queue()
        ticket.listen(self._incoming.put)

    def next(self) -> Event:
        self.events.append(self._incoming.get(timeout=PATIENCE))
        return self.events[-1]

    def end(self) -> Finished | Failed:
        while True:
            event = self.next()
            if isinstance(event, (Finished, Failed)):
                return event

    def finished(self) -> Finished:
        event = self.end()
        assert isinstance(event, Finished), event
        return event

    def failed(self) -> Exception:
        event = self.end()
        assert isinstance(event, Failed), event
        return event.error

    def kinds(self) -> list[str]:
        return [type(event).__name__ for event in self.events]
