"""What is noted of a request while it is answered, for its log line and its count."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from elastic_cache.events import Finished

CLIENT_GONE = 499
"""Status of a request whose client left before the answer began; nginx's, HTTP has none."""

_OUTCOMES = {401: "unauthorized", 429: "rejected", 503: "closed", CLIENT_GONE: "cancelled"}


@dataclass
class Record:
    """One request.

    Attributes:
        id: names the request in the log and in the header X-Request-Id.
        status: of the response; None before it began.
        outcome: how it ended, if the status alone does not tell.
        fields: of its log line.
    """

    id: str = field(default_factory=lambda: f"req-{uuid.uuid4().hex}")
    started: float = field(default_factory=time.perf_counter)
    status: int | None = None
    outcome: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Since the request came."""
        return time.perf_counter() - self.started

    def finish(self, finished: Finished) -> None:
        """Notes the answer."""
        generation, first = finished.generation, finished.timing.first_token
        self.outcome = "complete" if finished.is_complete else "incomplete"
        self.fields |= {
            "finish_reason": generation.finish_reason,
            "tokens": generation.num_tokens,
            "nfe": generation.nfe,
            "queue_seconds": round(finished.timing.queue, 4),
            "first_token_seconds": None if first is None else round(first, 4),
        }

    def ended_as(self) -> str:
        """The outcome, one of a few words."""
        status = self.status or CLIENT_GONE
        by_status = "failed" if status >= 500 else "invalid" if status >= 400 else "complete"
        return self.outcome or _OUTCOMES.get(status, by_status)
