"""Requests that are answered in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
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


def spy(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[tuple[Any, ...]]:
    """The arguments of every call of a method from here on, which does what it did."""
    calls: list[tuple[Any, ...]] = []
    method: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any) -> Any:
        calls.append(args)
        return method(*args)

    monkeypatch.setattr(owner, name, call)
    return calls
