"""Load on a service in this process, or with --url on a running server: speed and latencies.

    python benchmarks/bench_serving.py --batch 1 2 4 8 --policies elastic,rolling:num_rows=32
    python benchmarks/bench_serving.py --rate 2.5 --seconds 60 --url http://127.0.0.1:8000
    python benchmarks/bench_serving.py --soak 600 --clients 64

Without --rate as many clients as the batch is large ask again as soon as they have their answer;
with it requests arrive at random, so many a second on average. Policies and batch sizes take turns
in rounds, and every second round goes backwards, so that noise of the machine hits all alike; the
table has medians over rounds. Tokens are counted to the first EOS. Steps are those of the requests:
the median over requests of their median step, and the 99th percentile of their 99th percentiles.

--inflate gives the embedded model the size of LLaDA-8B with the same answers; --shape takes random
weights, which never emit EOS: every request ends after --max-steps steps then. --soak asks for as
many seconds with --clients streams and compares every answer with the one given one at a time (on a
GPU they are the same with --batch-invariant alone); it ends with exit status 1 if one differs, is
lost or fails, or if memory grows.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import random
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from elastic_cache.cli import options as shared
from elastic_cache.cli.bench import environment, load_engine
from elastic_cache.cli.table import format_table
from elastic_cache.device import find_device
from elastic_cache.engine import Engine, find_dtype
from elastic_cache.lab.cells import Cell, read_cells
from elastic_cache.models.inflate import SHAPES as INFLATED
from elastic_cache.problems import HELD_OUT_SEED, problems
from elastic_cache.service import Service
from serving_load import (
    HttpTarget,
    Limit,
    Prompt,
    Run,
    ServiceTarget,
    Target,
    closed_loop,
    memory,
    open_loop,
    quantile,
)
from serving_soak import Verdict, soak
from shapes import SHAPES, random_model

HEADER = (
    "policy", "batch", "tokens/s", "x batch 1", "requests/s", "queue s p50/95/99",
    "first token s p50/95/99", "total s p50/95/99", "step ms p50", "p99", "rows/step", "errors",
)  # fmt: skip
SHARES = (0.5, 0.95, 0.99)

Figures = dict[str, float | None]


@dataclasses.dataclass(frozen=True)
class Turn:
    """A policy at a batch size, in one round."""

    cell: Cell
    batch: int
    round: int


def plan(cells: Sequence[Cell], batches: Sequence[int], rounds: int) -> Iterator[Turn]:
    """All turns in order; every second round goes backwards."""
    for number in range(rounds):
        turns = [Turn(cell, batch, number) for cell in cells for batch in batches]
        yield from turns if number % 2 == 0 else reversed(turns)


def figures(run: Run) -> Figures:
    """What a window of load shows; seconds, and shares of its length."""
    good = [record for record in run.counted if record.error is None]
    length = max(run.end - run.begin, 1e-9)
    # Also those that ended outside of the window: it has their share of it.
    shares = [(r, r.share_within(run.begin, run.end)) for r in run.records if r.error is None]
    values: Figures = {
        "tokens_per_second": sum(r.tokens * share for r, share in shares) / length,
        "requests_per_second": sum(share for _, share in shares) / length,
        "num_counted": len(good),
        "num_errors": sum(record.error is not None for record in run.records),
        "rows_per_step": run.work.rows / run.work.steps if run.work and run.work.steps else None,
    }
    for name in ("queue", "first_token", "total"):
        seconds = [v for r in good if (v := getattr(r, name)) is not None]
        for share in SHARES:
            values[f"{name}_p{100 * share:.0f}"] = quantile(seconds, share)
    values["step_p50"] = quantile([r.step_p50 for r in good if r.step_p50 is not None], 0.5)
    values["step_p99"] = quantile([r.step_p99 for r in good if r.step_p99 is not None], 0.99)
    return values


def combine(rounds: Sequence[Figures]) -> Figures:
    """Medians over rounds; counts are added up."""
    combined: Figures = {}
    for name in rounds[0]:
        known = [value for figure in rounds if (value := figure[name]) is not None]
        merge = sum if name.startswith("num_") else statistics.median
        combined[name] = merge(known) if known else None
    return combined


def ratios(done: dict[Turn, Figures], cell: Cell, batch: int, rounds: int) -> list[float]:
    """Tokens/s over those of batch 1 in the same round, where both are known."""
    found = []
    for number in range(rounds):
        mine = done[Turn(cell, batch, number)]["tokens_per_second"]
        single = done.get(Turn(cell, 1, number), {}).get("tokens_per_second")
        if mine is not None and single:
            found.append(mine / single)
    return found


class Bench:
    """Everything that the turns of one command share.

    Args:
        options: of the command line, checked.
        engine: None if a server is asked.
        prompts: what is asked, in turn.
    """

    def __init__(
        self, options: argparse.Namespace, engine: Engine | None, prompts: Sequence[Prompt]
    ) -> None:
        self._options = options
        self._engine = engine
        self._prompts = prompts

    def measure(self, turn: Turn) -> Run:
        """One window of load."""
        settings = request_settings(turn.cell, self._options)
        if self._engine is None:
            return self._load(self._http(settings), turn)
        with Service(self._engine, turn.batch, self._options.max_queue) as service:
            return self._load(ServiceTarget(service, settings), turn)

    def soak(self, cell: Cell) -> Verdict:
        """Prints the verdict."""
        options, settings = self._options, request_settings(cell, self._options)
        alone = self._engine or load_engine(options, options.batch_invariant)
        answers = answer_alone(alone, map(str, self._prompts), max(options.batch), cell)
        lengths = (options.clients, options.soak)
        if self._engine is None:
            del alone
            target = self._http(settings)
            pid = options.pid
            read = None if pid is None else lambda: memory(str(pid))["now"]
            verdict = soak(target, answers, *lengths, read, lambda: target.get("/health")[0])
        else:
            with Service(self._engine, max(options.batch), options.clients) as service:
                served = ServiceTarget(service, settings)
                verdict = soak(served, answers, *lengths, lambda: memory()["now"], None)
        print(verdict)
        return verdict

    def write(self, values: dict[str, Any]) -> None:
        """The JSON file, if one was asked for."""
        if self._options.json is None:
            return
        where = self._where()
        text = shared.write_json({"command": command(sys.argv[1:]), "environment": where, **values})
        self._options.json.write_text(text + "\n")

    def _load(self, target: Target, turn: Turn) -> Run:
        options = self._options
        limit = Limit(None if options.requests else options.seconds, options.requests)
        if options.rate is not None:
            warm_up = options.warm_up * turn.batch
            rate, seed = options.rate, turn.round  # all cells of a round see the same arrivals
            return open_loop(target, self._prompts, rate, warm_up, limit, seed)
        return closed_loop(target, self._prompts, turn.batch, options.warm_up * turn.batch, limit)

    def _http(self, settings: dict[str, Any]) -> HttpTarget:
        return HttpTarget(self._options.url, settings, self._options.api_key, self._options.timeout)

    def _where(self) -> dict[str, Any]:
        if self._engine is not None:
            return environment(self._engine)
        return {"client": f"{platform.system()} {platform.machine()}", "server": "over HTTP"}


def answer_alone(
    engine: Engine, questions: Iterable[str], num_lanes: int, cell: Cell
) -> dict[str, str]:
    """Answers by question, one at a time, in as many lanes as they will be given together in."""
    batch, answers = engine.batch(num_lanes), {}
    for question in questions:
        request = batch.add(question, **dataclasses.asdict(cell.settings))
        while not request.is_finished:
            batch.step()
        answers[question] = request.result.text or ""
    return answers


def request_settings(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """What every request is asked for."""
    settings = dataclasses.asdict(cell.settings)
    return settings if options.max_steps is None else {**settings, "max_steps": options.max_steps}


def row(cell: Cell, batch: int, values: Figures, ratio: float | None) -> list[str]:
    """A line of the table."""

    def three(name: str) -> str:
        return "/".join(shown(values[f"{name}_p{100 * share:.0f}"], 2) for share in SHARES)

    return [
        cell.name,
        str(batch),
        shown(values["tokens_per_second"], 1),
        shown(ratio, 2),
        shown(values["requests_per_second"], 2),
        *(three(name) for name in ("queue", "first_token", "total")),
        shown(values["step_p50"], 1, 1e3),
        shown(values["step_p99"], 1, 1e3),
        shown(values["rows_per_step"], 1),
        shown(values["num_errors"], 0),
    ]


def shown(value: float | None, digits: int, unit: float = 1.0) -> str:
    return "-" if value is None else f"{unit * value:.{digits}f}"


def command(arguments: Sequence[str]) -> str:
    """How this run is asked for, without places of files and of servers."""
    words, hidden = ["benchmarks/bench_serving.py"], {"--json", "--api-key", "--pid"}
    left = iter(arguments)
    for word in left:
        name, is_joined, value = word.partition("=")
        if name in hidden:
            if not is_joined:
                next(left, None)
            continue
        if name in ("--url", "--model"):
            value = value if is_joined else next(left, "")
            place = "URL" if name == "--url" else value if value.isidentifier() else "MODEL"
            words += [name, place]
            continue
        words.append(word)
    return " ".join(words)


def read_prompts(options: argparse.Namespace, engine: Engine | None) -> list[Prompt]:
    """The problems' questions; for random weights token ids at random."""
    if options.shape is None:
        return [question for question, _ in problems(HELD_OUT_SEED, options.problems)]
    assert engine is not None
    chance, config = random.Random(0), engine.model.config
    ids = [token for token in range(config.vocab_size) if token != config.mask_id]
    return [chance.choices(ids, k=options.prompt_length) for _ in range(options.problems)]


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shared.add_model(parser)
    shared.add_batch_invariant(parser)
    parser.add_argument("--inflate", help="llada-8b: the model at that size, same answers")
    parser.add_argument("--shape", help="random weights: llada-8b or small")
    parser.add_argument("--prompt-length", type=int, default=256, help="tokens, with --shape")
    parser.add_argument("--policies", default="elastic", help="cells like rolling:num_rows=32")
    parser.add_argument("--problems", type=int, default=32, help="different questions")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rate", type=float, help="arrivals per second; without it closed loop")
    parser.add_argument("--seconds", type=float, default=10.0, help="a cell in a round")
    parser.add_argument("--requests", type=int, help="answers a cell in a round, instead")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=1, help="answers a client before counting")
    parser.add_argument("--max-steps", type=int, help="of a request (default: 64 with --shape)")
    parser.add_argument("--max-queue", type=int, default=1024)
    parser.add_argument("--url", help="a running server, instead of a service in this process")
    parser.add_argument("--api-key")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds without a byte")
    parser.add_argument("--pid", type=int, help="of the server, for its memory (--soak)")
    parser.add_argument("--soak", type=float, metavar="SECONDS")
    parser.add_argument("--clients", type=int, default=64, help="of --soak")
    parser.add_argument("--json", type=Path, help="where to write the results")
    shared.add_settings(parser, gen_length=256)
    options = parser.parse_args()
    check(parser, options)
    return options


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuses what cannot be measured, before a model is loaded."""
    counts = {name: getattr(options, name) for name in ("problems", "rounds", "clients")}
    counts |= {"batch": min(options.batch), "prompt-length": options.prompt_length}
    counts |= {} if options.requests is None else {"requests": options.requests}
    for name, value in counts.items():
        if value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if options.warm_up < 0:
        parser.error(f"--warm-up must be at least 0, got {options.warm_up}")
    for name in ("rate", "seconds", "soak"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            parser.error(f"--{name} must be above 0, got {value}")
    if options.shape is not None and (options.url or options.soak or options.inflate):
        parser.error("--shape has no texts: it goes with neither --url, --soak nor --inflate")
    if options.inflate not in (None, *INFLATED):
        parser.error(f"--inflate must be {', '.join(INFLATED)}, got {options.inflate!r}")
    if options.shape is not None and options.max_steps is None:
        options.max_steps = 64
    if options.soak is not None and options.max_steps is not None:
        parser.error("--soak compares whole answers: it does not go with --max-steps")


def make_engine(options: argparse.Namespace) -> Engine | None:
    """The model in this process; none if a server is asked."""
    if options.url is not None:
        return None
    if options.shape is None:
        return load_engine(options, options.batch_invariant)
    if options.shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {options.shape!r}")
    device, dtype = find_device(options.device), find_dtype(options.dtype)
    model = random_model(options.shape, device, dtype)
    return Engine(model, batch_invariant=options.batch_invariant)


def main() -> int:
    options = read_options()
    given = {k: v for k, v in shared.read_settings(options).items() if v is not None}
    cells = read_cells(options.policies, given)
    if any(cell.is_peer for cell in cells):
        raise ValueError("policies must be this engine's: other projects' decoders do not serve")
    engine = make_engine(options)
    bench = Bench(options, engine, read_prompts(options, engine))
    if options.soak is not None:
        verdicts = [bench.soak(cell) for cell in cells]
        names = [{"policy": cell.name, "clients": options.clients} for cell in cells]
        told = [{**name, **v.as_json()} for name, v in zip(names, verdicts, strict=True)]
        bench.write({"soaks": told})
        return 0 if all(verdict.is_good for verdict in verdicts) else 1
    before, done = memory()["now"], dict[Turn, Figures]()
    for turn in plan(cells, options.batch, options.rounds):
        done[turn] = figures(run := bench.measure(turn))
        for record in [record for record in run.records if record.error][:3]:
            print(f"{turn.cell.name}, batch {turn.batch}: {record.error}", file=sys.stderr)
    rows, results = [], []
    for cell in cells:
        for batch in options.batch:
            rounds = [done[Turn(cell, batch, number)] for number in range(options.rounds)]
            found = ratios(done, cell, batch, options.rounds)
            values, ratio = combine(rounds), statistics.median(found) if found else None
            rows.append(row(cell, batch, values, ratio))
            results.append({"policy": cell.name, "settings": request_settings(cell, options),
                            "batch": batch, "over_batch_1": ratio, **values,
                            "rounds": rounds})  # fmt: skip
    print(format_table(HEADER, rows))
    sizes = {"start": before, "end": memory()["now"], "peak": memory()["peak"]}
    print("this process: " + ", ".join(f"{k} {v / 2**20:.0f} MiB" for k, v in sizes.items()))
    bench.write({"memory_bytes": sizes, "cells": results})
    return 1 if any(result["num_errors"] for result in results) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
