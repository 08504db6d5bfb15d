"""What a request with a long text costs the others, in whose batch it joins.

    python benchmarks/bench_join.py --inflate llada-8b --device cuda --dtype bfloat16

Three requests of `rolling` with 32 rows are answered all the time; a fourth, whose text is random,
joins them and is taken out after its first step. For every --max-full-rows the table has medians
over --repeats of it: a step before it joins, the longest while it joins, the steps of the batch
until its first one is over, and how long that took. The settings take turns; the first two times
of each, in which kernels are loaded and steps captured, are left out.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import time
from collections.abc import Iterator

from elastic_cache.batch import Batch
from elastic_cache.cli import options as shared
from elastic_cache.cli.bench import load_engine
from elastic_cache.cli.table import format_table
from elastic_cache.models.inflate import SHAPES
from elastic_cache.problems import HELD_OUT_SEED, problems
from elastic_cache.request import Request

OTHERS = dict(policy="rolling", num_rows=32, gen_length=256)
LANES = 4
HEADER = ("max_full_rows", "a step, ms", "longest, ms", "steps", "first step after, ms")


class Crowd:
    """A batch whose lanes but one are always busy."""

    def __init__(self, batch: Batch, questions: Iterator[str]) -> None:
        self.batch = batch
        self._questions = questions

    def step(self) -> tuple[float, set[Request]]:
        """Milliseconds of a step, and whose step was over in it."""
        while self.batch.num_free > 1:
            self.batch.add(next(self._questions), **OTHERS)
        begin = time.perf_counter()
        outcomes = self.batch.step()
        return (time.perf_counter() - begin) * 1e3, {outcome.request for outcome in outcomes}

    def join(self, ids: list[int]) -> tuple[float, float, float, float]:
        """A row of the table, without the setting."""
        before = [self.step()[0] for _ in range(20)][10:]
        begin, times = time.perf_counter(), list[float]()
        long, done = self.batch.add(ids, **{**OTHERS, "gen_length": 64}), set[Request]()
        while long not in done:
            spent, done = self.step()
            times.append(spent)
        after = (time.perf_counter() - begin) * 1e3
        if long in self.batch.requests:
            self.batch.remove(long)
        return statistics.median(before), max(times), len(times), after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shared.add_model(parser)
    parser.add_argument("--inflate", choices=list(SHAPES))
    parser.add_argument("--length", type=int, default=1700, help="tokens of the long prompt")
    parser.add_argument("--max-full-rows", type=int, nargs="+", default=[2048, 512])
    parser.add_argument("--repeats", type=int, default=4)
    options = parser.parse_args()
    engine = load_engine(options)
    dice, config = random.Random(1), engine.model.config
    usual = [token for token in range(min(config.vocab_size, 700)) if token != config.mask_id]
    ids = dice.choices(usual, k=options.length)
    questions = itertools.cycle(q for q, _ in problems(HELD_OUT_SEED, 40))
    found: dict[int, list[tuple[float, float, float, float]]] = {}
    for _ in range(2):
        for rows in options.max_full_rows:
            batch = engine.batch(LANES, max_length=options.length + 64, max_full_rows=rows)
            crowd = Crowd(batch, questions)
            for _ in range(2):
                crowd.join(ids)
            found.setdefault(rows, []).extend(crowd.join(ids) for _ in range(options.repeats))
    table = []
    for rows, joins in found.items():
        medians = [statistics.median(values) for values in zip(*joins, strict=True)]
        table.append([str(rows), *(f"{value:.1f}" for value in medians)])
    print(format_table(HEADER, table))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
