"""Requests answered together, one step at a time; they join and leave between steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from elastic_cache.engine import Engine, Request
from elastic_cache.types import Message, Step


@dataclass(frozen=True)
class Outcome:
    """What a step of a batch was for one of its requests.

    Attributes:
        request: whose.
        step: what its step did; None when the answer is finished (`request.result`), when the
            request failed, and in a step that it had to wait through.
        error: why it failed; it has left the batch then.
    """

    request: Request
    step: Step | None
    error: Exception | None = None

    @property
    def is_over(self) -> bool:
        """Whether the request has left the batch: finished or failed."""
        return self.error is not None or self.request.is_finished


class Batch:
    """Up to `num_lanes` requests that share every step's stream of the weights.

    Args:
        engine: the loaded model.
        num_lanes: the most requests at a time.
    """

    def __init__(self, engine: Engine, num_lanes: int) -> None:
        self._engine = engine
        self._num_lanes = num_lanes
        self._requests: list[Request] = []

    @property
    def num_free(self) -> int:
        """Requests that may be added now."""
        return self._num_lanes - len(self._requests)

    @property
    def requests(self) -> Sequence[Request]:
        """Those being answered."""
        return tuple(self._requests)

    def add(
        self, prompt: str | Sequence[Message] | Sequence[int] | torch.Tensor, **settings: Any
    ) -> Request:
        """Begins a request, which takes part from the next step on.

        Args:
            prompt, settings: as of `Engine.generate`.

        Raises:
            ValueError: a sentence naming the argument and the rule it breaks; the batch is as before.
        """
        request = self._engine.stream(prompt, **settings)
        self._requests.append(request)
        return request

    def step(self) -> list[Outcome]:
        """One denoising step of every request. A request that fails leaves; the others go on."""
        outcomes = []
        for request in list(self._requests):
            try:
                outcomes.append(Outcome(request, request.step()))
            except Exception as error:
                outcomes.append(Outcome(request, None, error))
            if outcomes[-1].is_over:
                self._requests.remove(request)
        return outcomes

    def remove(self, request: Request) -> None:
        """Takes a request out between two steps: `request.stop` has its answer as it stands."""
        self._requests.remove(request)
