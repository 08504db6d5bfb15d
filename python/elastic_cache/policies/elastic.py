"""Policy `elastic`: Elastic-Cache (arXiv 2510.14973), ALGORITHM.md sections 3 and 4.

Step 0 is a full forward that fills the cache. Every later step computes the tracked tokens, the
positions committed in the step before, and the sliding window, and tests in every layer whether
the attention of the tracked tokens has drifted. The subtle thing: the test's verdict is written
on the device (`first_full_layer`), and layers from there on restart from their own cached inputs.
"""

from __future__ import annotations

from elastic_cache.cache import CacheNeeds
from elastic_cache.config import GenerationConfig
from elastic_cache.policies.window import WindowPolicy


class ElasticPolicy(WindowPolicy):
    """Sliding window, drift test on the most attended tokens, refresh from the failing layer on."""

    needs = CacheNeeds(keys_values=True, queries=True, inputs=True)
    tests_drift = True

    def __init__(self, masked: list[bool], settings: GenerationConfig) -> None:
        super().__init__(masked, settings)
        self.lookahead = 0 if settings.block_caching else len(masked)
