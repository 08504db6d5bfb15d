"""A service without a model: every answer has the same words, and waits where it is told to.

Tests of the server use it to hold a request at a place of their choice; what a service does with a
model is tested elsewhere.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from elastic_cache.events import Event, Failed, Finished, Progress, Started, Timing
from elastic_cache.models.tokenizer import Tokenizer
from elastic_cache.service import Service, ServiceClosedError, Stats
from elastic_cache.ticket import Ticket
from elastic_cache.types import Generation, Step

WORDS = ("Ava", " has", " 8", " apples", " now")
TEXT = "".join(WORDS)


class FakeTicket(Ticket):
    """One request: its events come from a thread that begins when someone listens."""

    def __init__(self, service: FakeService, prompt: Any, settings: dict[str, Any]) -> None:
        self.prompt = prompt
        self.settings = settings
        self.is_cancelled = threading.Event()
        self.is_over = threading.Event()
        self._service = service

    def listen(self, listener: Callable[[Event], None]) -> None:
        def run() -> None:
            for event in self._events():
                listener(event)
            self.is_over.set()

        threading.Thread(target=run, daemon=True).start()

    def cancel(self) -> None:
        self.is_cancelled.set()

    def _events(self) -> Any:
        service = self._service
        if not self._wait(service.starts):
            yield self._finished(0, "cancelled")
            return
        if service.failure is not None:
            yield Failed(service.failure)
            return
        yield Started(0.01, len(self.prompt))
        words = service.words
        ids = [service.tokenizer.encode(word)[0] for word in words]
        limit = self.settings.get("max_steps") or len(words)
        for index, word in enumerate(words[:limit]):
            if index == service.holds_at and not self._wait(service.goes_on):
                yield self._finished(index, "cancelled")
                return
            place, left = len(self.prompt) + index, len(words) - index - 1
            step = Step(index, 1, [place], [ids[index]], [0.5], [], [], 24, left)
            yield Progress(word, "\u2591" * left, step)
            if index == service.fails_at:
                yield Failed(RuntimeError("secret of the machine"))
                return
        yield self._finished(limit, "steps" if limit < len(words) else "eos")

    def _wait(self, event: threading.Event) -> bool:
        """Whether the event came before the request was cancelled."""
        while not event.wait(0.005):
            if self.is_cancelled.is_set():
                return False
        return True

    def _finished(self, num_steps: int, reason: str) -> Finished:
        text = "".join(self._service.words[:num_steps])
        generation = Generation(
            ids=torch.zeros(1, dtype=torch.int64),
            text=text,
            num_tokens=num_steps,
            nfe=num_steps,
            update_frequency=0.25,
            seconds=0.1,
            finish_reason=reason,
            settings={},
        )
        return Finished("", generation, Timing(0.01, 0.02 if num_steps else None, 0.1, 0.01, 0.02))


class FakeService(Service):
    """Attributes that tests set:

    words: of the answer; a step gives one of them.
    holds_at: the step before which an answer waits until `goes_on` is set; None for no such step.
    starts: requests wait in the queue until it is set; it is from the start.
    failure: what every request fails with; fails_at: a step after which they fail unforeseen.
    refusal: what `submit` raises.
    """

    max_length = 4096

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.tickets: list[FakeTicket] = []
        self.reset()

    def reset(self) -> None:
        """As new; what runs is cancelled."""
        for ticket in self.tickets:
            ticket.cancel()
        self.words = WORDS
        self.holds_at: int | None = None
        self.goes_on = threading.Event()
        self.starts = threading.Event()
        self.starts.set()
        self.failure: Exception | None = None
        self.fails_at: int | None = None
        self.refusal: Exception | None = None
        self.tickets = []

    def submit(self, prompt: Any, **settings: Any) -> FakeTicket:
        if self.refusal is not None:
            raise self.refusal
        self.tickets.append(FakeTicket(self, prompt, settings))
        return self.tickets[-1]

    def stats(self) -> Stats:
        running = [ticket for ticket in self.tickets if not ticket.is_over.is_set()]
        return Stats(3, len(running), 0, 0, 0, 0, 0, 70, 41, 1.5)

    def close(self, seconds: float = 30.0) -> None:
        self.refusal = ServiceClosedError("closed")
        end = time.monotonic() + seconds
        for ticket in self.tickets:
            if not ticket.is_over.wait(max(end - time.monotonic(), 0)):
                ticket.cancel()
