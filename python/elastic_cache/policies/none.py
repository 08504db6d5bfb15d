"""Policy `none`: every step is a full forward; the same window, commit and EOS rules.

This is the matched baseline of every quality and speed claim (ALGORITHM.md section 6).
"""

from __future__ import annotations

from elastic_cache.cache import CacheNeeds
from elastic_cache.policies.window import WindowPolicy


class NonePolicy(WindowPolicy):
    """Recomputes every position at every step."""

    needs = CacheNeeds(keys_values=False, queries=False, inputs=False)

    def observe(self, tokens: list[int], num_masked: int) -> None:
        super().observe(tokens, num_masked)
        self._is_full = True
