"""The problem sets of training: which seeds are for training, for watching it, and held out.

The generator itself ships in the package, elastic_cache/problems.py; importing it needs none of
the package's operators.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

from elastic_cache.problems import HELD_OUT_SEED, problem, problems

VALIDATION_SEED = HELD_OUT_SEED + 1
_SEEDS_PER_RUN = 1_000_000


def held_out(count: int) -> list[tuple[str, str]]:
    """The first `count` problems that no training run has seen."""
    return problems(HELD_OUT_SEED, count)


def validation(count: int) -> list[tuple[str, str]]:
    """Problems to watch a training run with, so that the held-out ones stay unlooked at."""
    return problems(VALIDATION_SEED, count)


def training_problems(seed: int, pool: int, excluded: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Endless problems of pool number `pool` of a run; questions in `excluded` are left out."""
    if not 0 <= seed < HELD_OUT_SEED // _SEEDS_PER_RUN or not 0 <= pool < _SEEDS_PER_RUN:
        raise ValueError(f"seed must be 0 to 1999 and pool below 1000000, got {seed} and {pool}")
    rng = random.Random(seed * _SEEDS_PER_RUN + pool)
    while True:
        pair = problem(rng)
        if pair[0] not in excluded:
            yield pair


def chat(question: str) -> str:
    """LLaDA's chat format, as the engine renders a prompt that is a plain text."""
    return (
        f"<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson's score interval)."""
    if trials == 0:
        return 0.0, 1.0
    z, p = 1.959964, successes / trials
    middle = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials**2)) / (1 + z * z / trials)
    return max(0.0, middle - half), min(1.0, middle + half)
