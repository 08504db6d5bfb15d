"""Policy `rolling`: a fixed number of rows a step and no refresh of whole layers.

Step 0 is a full forward that fills the cache. Every later step computes the positions committed in
the step before and the sliding window, and fills up to `num_rows` rows with cached positions, those
most due (`ops.rolling_rows`): what was committed in the last three steps, the masks that the window
comes to next, and of all others what lies near it or was computed long ago. So the cache is fresh
where the next tokens look, and a step takes the same time whatever has drifted: on a GPU 96 rows
cost little more than 16.

ALGORITHM.md section 6. Why these positions and numbers, and not attention: docs/results.md.
"""

from __future__ import annotations

from elastic_cache.cache import CacheNeeds
from elastic_cache.config import GenerationConfig
from elastic_cache.plan import RollingRule
from elastic_cache.policies.window import WindowPolicy


class RollingPolicy(WindowPolicy):
    """Sliding window; of all other positions those most due."""

    needs = CacheNeeds(keys_values=True, queries=False, inputs=False)
    rolling: RollingRule | None = RollingRule(ahead=8, repeats=3, reach=16)

    def __init__(self, masked: list[bool], settings: GenerationConfig) -> None:
        super().__init__(masked, settings)
        self.num_rows = min(settings.num_rows, len(masked))
        # A step may commit the whole window, and the next computes that and another window.
        if settings.num_rows >= 2 * self.window:
            self.steady_rows = self.num_rows
