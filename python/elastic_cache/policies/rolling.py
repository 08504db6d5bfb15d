"""Policy `rolling`: a fixed number of rows a step and no refresh of whole layers.

Step 0 is a full forward that fills the cache. Every later step computes the positions committed in
the step before, the sliding window, and then the cached positions that were computed longest ago,
up to `num_rows` rows in all. So every position is recomputed every few steps, in every layer, and
a step takes the same time whatever has drifted: on a GPU 64 rows cost little more than 16.

ALGORITHM.md section 6. Why age alone decides, and not also attention: docs/results.md.
"""

from __future__ import annotations

from elastic_cache.cache import CacheNeeds
from elastic_cache.config import GenerationConfig
from elastic_cache.policies.window import WindowPolicy


class RollingPolicy(WindowPolicy):
    """Sliding window; of all other positions those computed longest ago."""

    needs = CacheNeeds(keys_values=True, queries=False, inputs=False)

    def __init__(self, masked: list[bool], settings: GenerationConfig) -> None:
        super().__init__(masked, settings)
        self.num_rows = min(settings.num_rows, len(masked))
