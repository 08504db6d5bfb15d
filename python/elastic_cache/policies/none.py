"""Policy `none`: every step is a full forward; the same window, commit and EOS rules.

This is the matched baseline of every quality and speed claim (ALGORITHM.md section 6).
"""

from __future__ import annotations

from elastic_cache.cache import CacheNeeds
from elastic_cache.policies.window import WindowPolicy
from elastic_cache.types import Step


class NonePolicy(WindowPolicy):
    """Recomputes every position at every step."""

    needs = CacheNeeds(keys_values=False, queries=False, inputs=False)

    def observe(self, step: Step) -> None:
        super().observe(step)
        self._is_full = True
