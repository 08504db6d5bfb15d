"""Policy `elastic`: Elastic-Cache (arXiv 2510.14973), ALGORITHM.md sections 3 and 4.

Step 0 is a full forward that fills the cache. Every later step computes the tracked tokens, the
positions committed in the step before, and the sliding window, and tests in every layer whether
the attention of the tracked tokens has drifted. The subtle thing: the test's verdict is written
on the device (`first_full_layer`), and layers from there on restart from their own cached inputs.
"""

from __future__ import annotations

from elastic_cache.cache import CacheNeeds
from elastic_cache.config import GenerationConfig
from elastic_cache.plan import Plan
from elastic_cache.types import Step


class ElasticPolicy:
    """Sliding window, drift test on the most attended tokens, refresh from the failing layer on."""

    needs = CacheNeeds(keys_values=True, queries=True, inputs=True)
    drops_tail_at_eos = True
    tests_drift = True
    num_rows = 0

    def __init__(self, masked: list[bool], settings: GenerationConfig) -> None:
        self.window = min(settings.window, len(masked))
        self.num_candidates = self.window
        self.lookahead = 0 if settings.block_caching else len(masked)
        self._num_masked = sum(masked)
        self._is_first = True

    def plan(self, num_rows: int, num_candidates: int) -> Plan | None:
        return Plan(self._is_first, num_rows, num_candidates) if self._num_masked else None

    def observe(self, step: Step) -> None:
        self._is_first = False
        self._num_masked = step.num_masked
