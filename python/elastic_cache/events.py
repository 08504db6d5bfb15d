"""What the owner of a served request is told: it started, went on, and ended in one of two ways."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_cache.types import Generation, Step


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


Event = Started | Progress | Finished | Failed
