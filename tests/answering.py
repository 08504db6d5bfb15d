"""Requests that are answered in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from elastic_cache.batch import Batch
from elastic_cache.request import Request
from elastic_cache.types import Step


def together(
    batch: Batch, asked: Sequence[tuple[str, dict[str, Any]]]
) -> list[tuple[Request, list[Step]]]:
    """Every request, begun as soon as a lane is free, and its steps, in the order asked."""
    answered: dict[Request, list[Step]] = {}
    while len(answered) < len(asked) or batch.requests:
        while len(answered) < len(asked) and batch.num_free:
            question, settings = asked[len(answered)]
            answered[batch.add(question, **settings)] = []
        for outcome in batch.step():
            assert outcome.error is None and outcome.step is not None
            answered[outcome.request].append(outcome.step)
    return list(answered.items())
