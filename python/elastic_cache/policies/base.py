"""What a policy is: it plans the rows of each step and says what the step must keep.

A policy is host logic alone: it never touches tokens, the cache or the device. Whether a test for
drift sends layers to full mode is decided on the device, by the ops, from the policy's numbers.
"""

from __future__ import annotations

from typing import Protocol

from elastic_cache.cache import CacheNeeds
from elastic_cache.plan import Plan, RollingRule


class Policy(Protocol):
    """One request's policy; created per request, asked once per step.

    Attributes:
        needs: what the cache must keep from step to step.
        drops_tail_at_eos: whether an EOS ends the masks to its right.
        tests_drift: whether every layer runs the drift test.
        num_candidates: the most positions decoded in a step.
        window: masked positions that `ops.select_rows` lists; 0: the plans list positions.
        lookahead: further masked positions it lists, computed but not decoded.
        num_rows: rows that `ops.rolling_rows` fills every step to, with the cached positions
            most due; 0: it does not.
        rolling: how that is weighed; None where `num_rows` is 0.
        steady_rows: rows of every step after the first, at most, whatever the steps find; 0: they
            depend on that.
    """

    needs: CacheNeeds
    drops_tail_at_eos: bool
    tests_drift: bool
    num_candidates: int
    window: int
    lookahead: int
    num_rows: int
    rolling: RollingRule | None
    steady_rows: int

    def plan(self, num_rows: int, num_candidates: int) -> Plan | None:
        """The next step, for which so many rows and candidates are listed on the device (0 before
        a full pass); None when the answer is finished. Asking changes nothing."""
        ...

    def observe(self, tokens: list[int], num_masked: int) -> None:
        """Told which tokens the step committed, and how many positions are still masked."""
        ...
