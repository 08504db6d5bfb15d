"""A pass that tests the drift of all layers after the last one decides as one that tests each.

The first is how a GPU runs, the second how the CPU does; here both run on the CPU.
"""

from __future__ import annotations

import elastic_cache
import pytest
from elastic_cache import runner
from elastic_cache.problems import problems


def decisions(question: str, gamma: float) -> list[tuple[object, ...]]:
    model = elastic_cache.load("tiny", device="cpu")
    return [
        (step.first_full_layer, step.num_rows, step.committed, step.tokens, step.tracked)
        for step in model.stream(question, gen_length=48, gamma=gamma)
    ]


@pytest.mark.parametrize("gamma", [0.0, 0.97])
def test_deferred_drift(monkeypatch: pytest.MonkeyPatch, gamma: float) -> None:
    """At gamma 0 no layer fails; at 0.97 most steps refresh some."""
    question = next(question for question, _ in problems(seed=5, count=1))
    expected = decisions(question, gamma)
    monkeypatch.setattr(runner, "max_deferred", lambda model, shape: 128)
    assert decisions(question, gamma) == expected
    refreshed = [first for first, *_ in expected[1:] if first < 32]  # type: ignore[operator]
    assert bool(refreshed) == (gamma > 0)
