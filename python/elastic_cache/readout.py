"""What a batch remembers of a step of a sequence, and what the report says of it."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_cache.plan import Plan
from elastic_cache.report import (
    SEGMENT_WINDOW,
    STATUS_MASKED,
    STATUS_NOT_FINITE,
    Report,
)
from elastic_cache.request import Decoded, Request


@dataclass(frozen=True)
class Launched:
    """What the host has to remember of a sequence's step under way."""

    plan: Plan
    candidates: list[int]  # positions
    begin: int  # where the report has them


@dataclass(frozen=True)
class Pending:
    """A step whose full pass is not over: of who has failed the drift test, or has a long text.

    Attributes:
        launched: what it began as.
        first_full: the layer that the pass begins with.
        similarity: of the layers before.
        next_layer: with which it goes on.
    """

    launched: Launched
    first_full: int
    similarity: list[float]
    next_layer: int


@dataclass(frozen=True)
class Commits:
    """What a step committed; the lists are alike."""

    positions: list[int]
    tokens: list[int]
    confidence: list[float]


@dataclass(frozen=True)
class Done:
    """A sequence's step that is over, of which its request has not been told yet."""

    lane: int
    request: Request
    launched: Launched
    commits: Commits
    pending: Pending | None  # as it was before its full pass was over; None: it never was
    is_last: bool


class Reader:
    """A report as lists: indexing a handful of elements by tensors costs more than all of this."""

    def __init__(self, report: Report, capacity: int) -> None:
        self._segments: list[list[int]] = report.segments.tolist()
        self._status: list[list[int]] = report.status.tolist()
        self._candidates: list[int] = report.candidates.tolist()
        self._token: list[int] = report.token.tolist()
        self._confidence: list[float] = report.confidence.tolist()
        self._is_committed: list[bool] = report.is_committed.tolist()
        self._tracked = report.tracked
        self._similarity = report.similarity
        self._capacity = capacity

    def counts(self, lane: int) -> tuple[int, int]:
        """Rows and candidates listed for the next window pass."""
        segment = self._segments[lane]
        return sum(segment[1:]), segment[SEGMENT_WINDOW]

    def candidates(self, lane: int) -> tuple[int, list[int]]:
        """Where the candidates of the next window pass stand, and their positions."""
        begin = sum(segment[SEGMENT_WINDOW] for segment in self._segments[:lane])
        slots = self._candidates[begin : begin + self._segments[lane][SEGMENT_WINDOW]]
        return begin, [slot - lane * self._capacity for slot in slots]

    def has_failed(self, lane: int) -> bool:
        """Whether a candidate had no probability."""
        return self._status[lane][STATUS_NOT_FINITE] > 0

    def num_masked(self, lane: int) -> int:
        """Positions that are still masked."""
        return self._status[lane][STATUS_MASKED]

    def commits(self, launched: Launched) -> Commits:
        """What a step committed."""
        begin, candidates = launched.begin, launched.candidates
        hits = [i for i in range(len(candidates)) if self._is_committed[begin + i]]
        return Commits(
            [candidates[i] for i in hits],
            [self._token[begin + i] for i in hits],
            [self._confidence[begin + i] for i in hits],
        )

    def read(self, done: Done, depth: int) -> Decoded:
        """What became of a step through so many layers."""
        lane, commits, plan = done.lane, done.commits, done.launched.plan
        if done.pending is not None:
            first_full, similarity = done.pending.first_full, done.pending.similarity
        else:
            first_full = 0 if plan.is_full else depth
            similarity = self._similarity[:first_full, lane].tolist()
        tracked: set[int] = set(self._tracked[:, lane].flatten().tolist())
        return Decoded(
            committed=commits.positions,
            tokens=commits.tokens,
            confidence=commits.confidence,
            num_candidates=len(done.launched.candidates),
            first_full=first_full,
            num_rows=len(done.request.prompt.ids) if plan.is_full else plan.num_rows,
            num_masked=self.num_masked(lane),
            num_not_finite=self._status[lane][STATUS_NOT_FINITE],
            tracked=sorted(tracked - {-1}),
            similarity=similarity,
        )
