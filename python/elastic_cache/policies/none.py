"""Policy `none`: every step is a full forward; the same window, commit and EOS rules.

This is the matched baseline of every quality and speed claim (ALGORITHM.md section 6).
"""

from __future__ import annotations

from elastic_cache.cache import CacheNeeds
from elastic_cache.config import GenerationConfig
from elastic_cache.plan import Plan
from elastic_cache.policies.window import WindowSelector
from elastic_cache.state import DecodeState
from elastic_cache.types import Step


class NonePolicy:
    """Recomputes every position at every step."""

    needs = CacheNeeds(keys_values=False, queries=False, inputs=False)
    drops_tail_at_eos = True

    def __init__(self, state: DecodeState, settings: GenerationConfig) -> None:
        self._selector = WindowSelector(state, settings.window, lookahead=0)
        self._num_masked = int(state.masked.sum())

    def plan(self, state: DecodeState) -> Plan | None:
        if self._num_masked == 0:
            return None
        rows, candidates, candidate_rows = self._selector.select(state)
        return Plan(True, rows, candidates, candidate_rows)

    def observe(self, step: Step) -> None:
        self._num_masked = step.num_masked
