"""What one step computes, as plain host data; the row lists themselves are on the device."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """What one step computes.

    Attributes:
        is_full: every layer computes every position.
        num_rows: rows computed in the layers that reuse the cache.
        num_candidates: of them, those whose logits are decoded.
        listed: positions to compute, the first `num_candidates` of which are decoded; None: as
            `ops.select_rows` has listed them.
        num_commits: commit exactly this many candidates instead of the request's rule.
    """

    is_full: bool
    num_rows: int
    num_candidates: int
    listed: range | None = None
    num_commits: int | None = None


@dataclass(frozen=True)
class RollingRule:
    """How `ops.rolling_rows`, whose arguments these are, weighs which positions are due."""

    ahead: int
    repeats: int
    reach: int


@dataclass(frozen=True)
class FullPass:
    """Layers that run over every position of a sequence in a step.

    Attributes:
        begin, end: layers begin .. end - 1. The pass is over where `end` is the model's depth; else
            a later step goes on from there.
        first: the layer that the pass began with.
    """

    first: int
    begin: int
    end: int
