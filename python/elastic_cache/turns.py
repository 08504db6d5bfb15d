"""Who computes whole sequences in a step of a batch, and how many layers of them.

What a step may have is counted in rows times layers, as its time is. Whoever has waited longest is
first, and goes on until its pass is over; if all its layers are more than a step may have, it runs
some of them now and the others in the next steps.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping


class Turns:
    """The turns of the lanes of a batch.

    Args:
        num_lanes, depth: lanes of the batch, layers of the model.
        max_rows: rows through all layers that a step may have.
    """

    def __init__(self, num_lanes: int, depth: int, max_rows: int) -> None:
        self._depth = depth
        self._budget = self._left = max_rows * depth
        self._ends: dict[int, int] = {}  # of the step: the layer before which a lane ends
        self._over_at = [0] * num_lanes  # the step in which a lane's last pass was over
        self._step = 0

    def join(self, lane: int) -> None:
        """From now on the lane waits with the others."""
        self._over_at[lane] = self._step

    def fits(self, lengths: Iterable[int]) -> bool:
        """Whether a step may have the full passes of sequences of these lengths."""
        return sum(lengths) * self._depth <= self._budget

    def begin(self, waiting: Mapping[int, tuple[int, int]], is_bounded: bool = True) -> None:
        """Begins a step.

        Args:
            waiting: by lane the length of its sequence and the layer with which it goes on.
            is_bounded: whether there is anybody whom a long step would keep waiting.
        """
        self._step += 1
        self._ends, self._left = {}, self._budget if is_bounded else sys.maxsize
        for lane in sorted(waiting, key=self._over_at.__getitem__):
            if not self.take(lane, *waiting[lane]):
                break

    def take(self, lane: int, length: int, first: int) -> bool:
        """Whether the lane has a turn in this step, from layer `first` on."""
        end = self._depth
        if length * (end - first) > self._left:
            if self._ends:
                return False
            end = min(first + max(self._left // length, 1), end)
        self._ends[lane] = end
        self._left -= length * (end - first)
        if end == self._depth:
            self._over_at[lane] = self._step
        return True

    def end(self, lane: int) -> int | None:
        """The layer before which the lane's turn in this step ends; None if it has none."""
        return self._ends.get(lane)

    def finish(self) -> None:
        """Ends the step."""
        self._ends = {}

    def __bool__(self) -> bool:
        """Whether anybody has a turn."""
        return bool(self._ends)
