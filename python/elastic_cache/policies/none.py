"""Policy `none`: every step is a full forward; the same window, commit and EOS rules.

This is the matched baseline of every quality and speed claim (ALGORITHM.md section 6).
"""

from __future__ import annotations

from elastic_cache.cache import CacheNeeds
from elastic_cache.config import GenerationConfig
from elastic_cache.plan import Plan
from elastic_cache.types import Step


class NonePolicy:
    """Recomputes every position at every step."""

    needs = CacheNeeds(keys_values=False, queries=False, inputs=False)
    drops_tail_at_eos = True
    tests_drift = False
    lookahead = num_rows = 0

    def __init__(self, masked: list[bool], settings: GenerationConfig) -> None:
        self.window = min(settings.window, len(masked))
        self.num_candidates = self.window
        self._num_masked = sum(masked)

    def plan(self, num_rows: int, num_candidates: int) -> Plan | None:
        return Plan(True, num_rows, num_candidates) if self._num_masked else None

    def observe(self, step: Step) -> None:
        self._num_masked = step.num_masked
