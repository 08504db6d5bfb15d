"""Many requests at once: a queue, and one thread that steps the batch.

Whoever asks never touches the engine: requests go in through a queue, and events come out to
listeners, which the thread calls. Only that thread adds to, steps and removes from the batch, so
nothing is shared. Between two steps it looks at cancellations, deadlines and the queue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Union

import torch

from elastic_cache.engine import Engine
from elastic_cache.types import Generation, Message, Step


@dataclass(frozen=True)
class Started:
    """The request left the queue.

    Attributes:
        queue_seconds: how long it waited.
        prompt_tokens: length of the encoded prompt.
    """

    queue_seconds: float
    prompt_tokens: int


@dataclass(frozen=True)
class Progress:
    """One step of the request.

    Attributes:
        delta: text that is final from now on and continues all earlier deltas: the answer up to its
            first undecoded position. The deltas of a request joined are its text. May be empty.
        provisional: what stands behind that: decoded positions as text, undecoded ones as "\u2591".
        step: what the step did.
    """

    delta: str
    provisional: str
    step: Step


@dataclass(frozen=True)
class Timing:
    """Seconds of a finished request.

    Attributes:
        queue: from submission to the batch.
        first_token: from submission to the first committed token; None if there was none.
        total: from submission to the end.
        step_p50, step_p99: of the steps it took part in; 0 if there was none.
    """

    queue: float
    first_token: float | None
    total: float
    step_p50: float
    step_p99: float


@dataclass(frozen=True)
class Finished:
    """The answer: complete, or as it stood when a limit was reached or it was cancelled.

    Attributes:
        delta: the rest of the text, as in Progress.
        generation: with finish_reason "eos", "length", "deadline", "steps" or "cancelled".
        timing: seconds.
    """

    delta: str
    generation: Generation
    timing: Timing

    @property
    def is_complete(self) -> bool:
        return self.generation.finish_reason in ("eos", "length")


@dataclass(frozen=True)
class Failed:
    """The request failed; others are not affected.

    Attributes:
        error: a sentence for the user is str(error).
    """

    error: Exception


Event = Union[Started, Progress, Finished, Failed]


class QueueFullError(Exception):
    """Nothing can be accepted now; another time it can."""


class ServiceClosedError(Exception):
    """The service accepts nothing any more."""


@dataclass(frozen=True)
class Stats:
    """The service now, and since its start.

    Attributes:
        num_queued, num_running: requests waiting, and in the batch.
        num_finished, num_failed, num_cancelled, num_incomplete: requests that ended so; a deadline
            or step budget makes an answer incomplete.
        num_rejected: refused because the queue was full.
        num_tokens: tokens of finished answers.
        num_steps: steps of the batch.
        busy_seconds: time spent in them.
    """

    num_queued: int
    num_running: int
    num_finished: int
    num_failed: int
    num_cancelled: int
    num_incomplete: int
    num_rejected: int
    num_tokens: int
    num_steps: int
    busy_seconds: float


class Ticket:
    """A submitted request, as its owner sees it."""

    def events(self) -> Iterator[Event]:
        """Waits for and gives every event in turn; ends after Finished or Failed."""
        raise NotImplementedError

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Calls `listener` with every event so far and to come, from the service's thread; it must
        return at once and not raise. One listener at most; not together with `events`."""
        raise NotImplementedError

    def cancel(self) -> None:
        """Ends the request before the next step; Finished follows. Harmless when it is over."""
        raise NotImplementedError

    def result(self) -> Finished:
        """Waits for the end; raises the error of a request that failed."""
        raise NotImplementedError


class Service:
    """Answers requests with one model until it is closed.

    Args:
        engine: the loaded model; nobody else may use it meanwhile.
        num_lanes: requests answered together, at most.
        max_queue: requests waiting, at most.
    """

    def __init__(self, engine: Engine, num_lanes: int = 8, max_queue: int = 64) -> None:
        raise NotImplementedError

    def submit(
        self,
        prompt: str | Sequence[Message] | Sequence[int] | torch.Tensor,
        *,
        priority: int = 0,
        deadline: float | None = None,
        max_steps: int | None = None,
        **settings: Any,
    ) -> Ticket:
        """Queues a request.

        Args:
            prompt, settings: as of `Engine.generate`; checked here, before queueing.
            priority: of those waiting the highest goes first, equals in order of arrival.
            deadline: seconds from now until which there must be an answer: then it ends as it
                stands, also if it is still queued (an empty answer).
            max_steps: denoising steps after which it ends as it stands.

        Raises:
            ValueError: a sentence naming the argument and the rule it breaks.
            QueueFullError: so many are waiting.
            ServiceClosedError: it has been closed.
        """
        raise NotImplementedError

    def stats(self) -> Stats:
        raise NotImplementedError

    def close(self, seconds: float = 30.0) -> None:
        """Accepts nothing more, fails what is queued (ServiceClosedError), gives what runs so many
        seconds to finish, ends the rest as it stands ("cancelled"), and joins the thread."""
        raise NotImplementedError
