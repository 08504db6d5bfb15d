"""What the policies with a sliding window share: none, elastic and rolling."""

from __future__ import annotations

from elastic_cache.cache import CacheNeeds
from elastic_cache.config import GenerationConfig
from elastic_cache.plan import Plan, RollingRule


class WindowPolicy:
    """Decodes the leftmost masked positions; step 0 is a full forward, later steps reuse it."""

    needs: CacheNeeds
    drops_tail_at_eos = True
    tests_drift = False
    rolling: RollingRule | None = None

    def __init__(self, masked: list[bool], settings: GenerationConfig) -> None:
        self.window = min(settings.window, len(masked))
        self.num_candidates = self.window
        self.lookahead = self.num_rows = self.steady_rows = 0
        self._length = len(masked)
        self._num_masked = sum(masked)
        self._is_full = True  # the next step

    def plan(self, num_rows: int, num_candidates: int) -> Plan | None:
        if not self._num_masked:
            return None
        if self._is_full:
            return Plan(True, self._length, min(self.window, self._num_masked))
        return Plan(False, num_rows, num_candidates)

    def observe(self, tokens: list[int], num_masked: int) -> None:
        self._is_full = False
        self._num_masked = num_masked
