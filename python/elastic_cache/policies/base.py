"""What a policy is: it plans the rows of each step and says what the cache must keep.

A policy never touches tokens or the cache. Its plan is data: row lists on the device and, for
policies that test for drift, the tensors the decision is written to.
"""

from __future__ import annotations

from typing import Protocol

from elastic_cache.cache import CacheNeeds
from elastic_cache.plan import Plan
from elastic_cache.state import DecodeState
from elastic_cache.types import Step


class Policy(Protocol):
    """One request's policy; created per request, asked once per step."""

    needs: CacheNeeds
    drops_tail_at_eos: bool

    def plan(self, state: DecodeState) -> Plan | None:
        """The next step, or None when the answer is finished."""
        ...

    def observe(self, step: Step) -> None:
        """Told what the step committed."""
        ...
