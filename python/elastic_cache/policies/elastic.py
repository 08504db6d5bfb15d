"""Policy `elastic`: Elastic-Cache (arXiv 2510.14973), ALGORITHM.md sections 3 and 4.

Step 0 is a full forward that fills the cache. Every later step computes the tracked tokens, the
positions committed in the step before, and the sliding window, and tests in every layer whether
the attention of the tracked tokens has drifted. The subtle thing: the test's verdict is written
on the device (`first_full_layer`), and layers from there on restart from their own cached inputs.
"""

from __future__ import annotations

import torch

from elastic_cache.cache import CacheNeeds
from elastic_cache.config import GenerationConfig
from elastic_cache.plan import DriftTest, Plan
from elastic_cache.policies.window import WindowSelector
from elastic_cache.state import DecodeState
from elastic_cache.types import Step


class ElasticPolicy:
    """Sliding window, drift test on the most attended tokens, refresh from the failing layer on."""

    needs = CacheNeeds(keys_values=True, queries=True, inputs=True)
    drops_tail_at_eos = True

    def __init__(self, state: DecodeState, settings: GenerationConfig) -> None:
        lookahead = 0 if settings.block_caching else state.capacity
        self._selector = WindowSelector(state, settings.window, lookahead)
        self._num_layers = state.tracked.shape[0]
        self._num_masked = int(state.masked.sum())
        self._is_first = True
        device, shape = state.tokens.device, state.tokens.shape
        self._drift = DriftTest(
            gamma=torch.full((shape[0],), settings.gamma, dtype=torch.float64, device=device),
            first_full_layer=torch.zeros(shape[0], dtype=torch.int32, device=device),
            tracked=state.tracked.unbind(),
            masked=state.masked,
            row_segments=self._selector.segments,
            window_segments=self._selector.window_segments,
            mass=torch.zeros(shape, dtype=torch.float32, device=device),
            similarity=torch.zeros(shape[0], dtype=torch.float64, device=device),
        )

    def plan(self, state: DecodeState) -> Plan | None:
        if self._num_masked == 0:
            return None
        rows, candidates, candidate_rows = self._selector.select(state)
        self._drift.first_full_layer.fill_(self._num_layers)
        return Plan(self._is_first, rows, candidates, candidate_rows, self._drift)

    def observe(self, step: Step) -> None:
        self._is_first = False
        self._num_masked = step.num_masked
