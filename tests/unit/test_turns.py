"""Turns: how many layers over whole sequences run in a step, and whose."""

from __future__ import annotations

from elastic_cache.turns import Turns


def ends(turns: Turns, count: int = 4) -> list[int | None]:
    return [turns.end(lane) for lane in range(count)]


def test_as_many_whole_passes_as_fit() -> None:
    turns = Turns(4, depth=10, max_rows=100)
    turns.begin({0: (60, 0), 1: (40, 0), 2: (1, 0)})
    assert ends(turns) == [10, 10, None, None] and turns
    turns.finish()
    assert ends(turns) == [None] * 4 and not turns


def test_what_is_left_is_counted_in_layers() -> None:
    """A pass that goes on from the middle costs half."""
    turns = Turns(4, depth=10, max_rows=100)
    turns.begin({0: (100, 5), 1: (50, 0)})
    assert ends(turns) == [10, 10, None, None]
    assert not turns.take(2, 1, 9)


def test_a_pass_that_is_too_long_runs_some_layers_and_goes_on_first() -> None:
    turns = Turns(4, depth=10, max_rows=100)
    waiting = {0: (250, 0), 1: (100, 0)}
    for layer in (4, 8):
        turns.begin(waiting)
        assert ends(turns) == [layer, None, None, None]
        waiting[0] = 250, layer
    turns.begin(waiting)  # 500 of 1,000 are left: not enough for lane 1
    assert ends(turns) == [10, None, None, None]
    turns.begin({0: (250, 0), 1: (100, 0)})
    assert ends(turns) == [None, 10, None, None]


def test_nobody_to_keep_waiting() -> None:
    turns = Turns(4, depth=10, max_rows=100)
    turns.begin({0: (250, 0)}, is_bounded=False)
    assert ends(turns) == [10, None, None, None]
    assert turns.take(1, 250, 0)


def test_a_layer_at_least() -> None:
    turns = Turns(1, depth=3, max_rows=1)
    for layer in range(3):
        turns.begin({0: (50, layer)})
        assert turns.end(0) == layer + 1


def test_who_joins_waits_behind_those_that_have_waited_longer() -> None:
    turns = Turns(4, depth=2, max_rows=10)
    waiting = {0: (10, 0), 1: (10, 0)}
    turns.begin(waiting)
    assert ends(turns) == [2, None, None, None]
    turns.join(2)
    waiting[2] = 10, 0
    for lane in (1, 0, 2, 1):
        turns.begin(waiting)
        assert ends(turns) == [2 if lane == other else None for other in range(4)]
