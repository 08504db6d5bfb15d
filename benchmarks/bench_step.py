"""Times whole steps of a model with random weights, against the memory's speed and a peer.

    python benchmarks/bench_step.py --shape llada-8b [--peer CHECKOUT] [--json FILE]

A step is what a request waits for: launch, all layers with drift test, head, commit, selection of
the next rows, read-back; wall time on the host, GPU idle before it. Rows of a step: a window (16),
2 committed, up to 12 tracked (the embedded model's 32 layers choose 12 different ones on average;
--tracked), the rest lookahead. Before every step the state is put back (not
timed), so that every step does the same work. The caches hold what a full pass left, never zeros.
Refreshes are forced at a layer; everything else is as it is in a request. Policies `rolling` and
`none` are timed from the same tokens, with the same window to decode.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from elastic_cache.cache import CacheNeeds
from elastic_cache.config import GenerationConfig
from elastic_cache.graphs import capture_stream
from elastic_cache.models.weights import Model
from elastic_cache.plan import FullPass, Plan
from elastic_cache.policies.elastic import ElasticPolicy
from elastic_cache.policies.none import NonePolicy
from elastic_cache.policies.rolling import RollingPolicy
from elastic_cache.runner import Runner
from elastic_cache.shape import RunnerShape, Start, capacity_for
from harness import DTYPES, num_bytes, stream_rate, synchronise
from shapes import SHAPES, random_model

WINDOW, NUM_COMMITTED = 16, 2
WARM_UP_STEPS = 5
NEVER = -2.0  # a gamma below every cosine


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one kind of step."""

    label: str
    length: int
    rows: int
    steps: int
    median: float
    p95: float
    p99: float
    least: float

    def __str__(self) -> str:
        tail = self.p99 / self.median
        return (
            f"{self.label:<28}{self.length:>6}{self.rows:>6}{self.median:>10.3f}{self.p95:>10.3f}"
            f"{self.p99:>10.3f}{tail:>8.3f}"
        )


class BenchRunner(Runner):
    """A runner of one sequence whose lists are given and whose verdict may be forced."""

    forced_layer: int | None = None
    max_tracked = 12

    def run(self, plan: Plan) -> None:
        """A whole step, with what its drift test asks for."""
        report = self.finish(self.launch({0: plan}))
        first = self.forced_layer
        if first is None:
            first = int(report.first_full_layer[0])
        if first < self._depth and not plan.is_full:
            self.refresh({0: FullPass(first, first, self._depth)})

    def set_lists(self, num_rows: int) -> Plan:
        """Lists `num_rows` rows of the kinds a step has; decodes the window."""
        window = min(WINDOW, num_rows // 2)
        tracked = min(self.max_tracked, num_rows - window - NUM_COMMITTED)
        lookahead = num_rows - window - NUM_COMMITTED - tracked
        masked = self._state.masked[0].nonzero().flatten()
        length = len(self._start_of(0).ids)
        text = (~self._state.masked[0, :length]).nonzero().flatten()
        chosen = text[torch.randperm(len(text), device=text.device)[: tracked + NUM_COMMITTED]]
        kinds = (chosen[:tracked], chosen[tracked:], masked[: window + lookahead])
        rows, lists = torch.cat([kind.sort().values for kind in kinds]).int(), self._lists
        first = tracked + NUM_COMMITTED
        lists.rows.fill_(-1)[:num_rows] = rows
        lists.segments.copy_(torch.tensor([[0, tracked, NUM_COMMITTED, window, lookahead]]))
        lists.window_rows.fill_(-1)[:window] = torch.arange(
            first, first + window, dtype=torch.int32, device=rows.device
        )
        lists.candidates.fill_(-1)[:window] = rows[first : first + window]
        return Plan(False, num_rows, window)

    def snapshot(self) -> Callable[[], None]:
        """A function that puts state and lists back as they are now."""
        tensors = [*vars(self._state).values(), *vars(self._lists).values()]
        copies = [tensor.clone() for tensor in tensors]

        def restore() -> None:
            for tensor, copy in zip(tensors, copies, strict=True):
                tensor.copy_(copy)

        return restore


def make_runner(
    model: Model,
    length: int,
    *,
    needs: CacheNeeds = ElasticPolicy.needs,
    tests_drift: bool = False,
    rolling_rows: int = 0,
    capture: bool = True,
) -> BenchRunner:
    """A runner after its full step, a third of the sequence still masked."""
    shape = RunnerShape(
        num_sequences=1,
        capacity=capacity_for(length, model),
        needs=needs,
        num_candidates=WINDOW,
        track_num=1,
        num_chosen=rolling_rows,
        selects_rows=True,
        tests_drift=tests_drift,
        rolling=RollingPolicy.rolling if rolling_rows else None,
        has_noise=False,
        eos_id=-1,
    )
    runner = BenchRunner(model, shape, capture_stream(model.device, capture))
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, model.config.vocab_size, (length,), generator=generator)
    masked = torch.arange(length) >= length - length // 3
    ids[masked] = model.config.mask_id
    settings = GenerationConfig(window=WINDOW, gamma=NEVER, gen_length=int(masked.sum()))
    reuses = needs.keys_values
    runner.start(0, Start(ids, masked, WINDOW, 0, rolling_rows, tests_drift, reuses, settings))
    runner.run(Plan(True, length, WINDOW))
    return runner


@dataclass(frozen=True)
class Cell:
    """A step to be timed."""

    label: str
    runner: BenchRunner
    plan: Plan


def time_steps(cells: list[Cell], length: int, steps: int, device: torch.device) -> list[Timing]:
    """Wall time of launch to finish; the state is put back before each.

    The cells take turns, so that a GPU that grows warm, and slower, does so for all of them.
    """
    restores = [cell.runner.snapshot() for cell in cells]
    times: list[list[float]] = [[] for _ in cells]
    for index in range(WARM_UP_STEPS + steps):
        for cell, restore, own in zip(cells, restores, times, strict=True):
            with torch.inference_mode():
                restore()
            synchronise(device)
            begin = time.perf_counter()
            cell.runner.run(cell.plan)
            if index >= WARM_UP_STEPS:
                own.append(1e3 * (time.perf_counter() - begin))
    for restore in restores:
        with torch.inference_mode():
            restore()
    return [
        summarize(cell.label, length, cell.plan.num_rows, own)
        for cell, own in zip(cells, times, strict=True)
    ]


def summarize(label: str, length: int, rows: int, times: list[float]) -> Timing:
    ordered = sorted(times)

    def share(part: float) -> float:
        return ordered[min(int(part * len(ordered)), len(ordered) - 1)]

    return Timing(
        label, length, rows, len(times), statistics.median(times), share(0.95), share(0.99),
        ordered[0],
    )  # fmt: skip


def measure_length(
    model: Model, length: int, rows: list[int], refreshes: list[int], steps: int
) -> list[Timing]:
    """All cells of one sequence length."""
    timings: list[Timing] = []
    device, depth, few = model.device, model.config.num_layers, max(steps // 10, 10)
    runner, untested = (make_runner(model, length, tests_drift=tests) for tests in (True, False))

    def add(num_steps: int, *cells: Cell) -> None:
        for timing in time_steps(list(cells), length, num_steps, device):
            timings.append(timing)
            print(timing, flush=True)

    for count in rows:
        add(
            steps,
            Cell("window step", runner, runner.set_lists(count)),
            Cell("window step, no drift test", untested, untested.set_lists(count)),
        )
    plan = runner.set_lists(max(32, rows[0]))
    for layers in (k for k in refreshes if k <= depth):
        runner.forced_layer = depth - layers
        add(few, Cell(f"with {layers} layers refreshed", runner, plan))
    runner.forced_layer = None
    add(few, Cell("full step", runner, Plan(True, length, WINDOW)))
    del runner, untested
    none = make_runner(model, length, needs=NonePolicy.needs)
    for count in (count for count in rows if WINDOW < count <= length):
        rolling = make_runner(model, length, needs=RollingPolicy.needs, rolling_rows=count)
        add(
            steps,
            Cell("rolling", rolling, Plan(False, count, WINDOW)),
            Cell("none, in turns with it", none, Plan(True, length, WINDOW)),
        )
    eager = make_runner(model, length, tests_drift=True, capture=False)
    add(10, Cell("window step, eager", eager, eager.set_lists(rows[0])))
    return timings


def weight_bytes(model: Model) -> int:
    """Bytes of the weights that every step reads."""
    weights = model.weights
    layers = [tensor for layer in weights.layers for tensor in vars(layer).values()]
    used = [*layers, weights.head, weights.final_norm]
    return num_bytes(*(tensor for tensor in used if tensor is not None))


def environment(device: torch.device) -> dict[str, Any]:
    driver = ""
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "driver": driver,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }


def measure_peer(checkout: Path, model: Model, length: int, steps: int) -> list[Timing]:
    """Fast-dLLM's dual-cache block step of 32 rows, all of them masked and half of them."""
    from elastic_cache.lab.fast_dllm import FastDLLM

    peer = FastDLLM(checkout, model.config, model.weights, model.device)
    timings = []
    for masked in (32, 16):
        times = peer.time_block_step(length, block_length=32, steps=steps, num_masked=masked)
        label = f"Fast-dLLM dual, {masked} masked"
        timings.append(summarize(label, length, 32, times))
        print(timings[-1], flush=True)
    return timings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llada-8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--refreshes", type=int, nargs="+", default=[1, 8, 16, 31])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tracked", type=int, default=12, help="tracked rows, at most")
    parser.add_argument("--peer", type=Path, help="a checkout of Fast-dLLM")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    BenchRunner.max_tracked = options.tracked
    device = torch.device(options.device)
    where = environment(device)
    print(where["gpu"] or "CPU", where["driver"], "torch", where["torch"], flush=True)
    model = random_model(options.shape, device, DTYPES[options.dtype])
    rate, size = stream_rate(device), weight_bytes(model)
    floor = 1e3 * size / rate
    print(f"read-only stream {rate / 1e12:.2f} TB/s; weights {size / 1e9:.2f} GB: {floor:.2f} ms")
    print(
        f"{'milliseconds':<28}{'T':>6}{'rows':>6}{'median':>10}{'p95':>10}{'p99':>10}{'p99/50':>8}"
    )
    timings: list[Timing] = []
    for length in options.lengths:
        timings += measure_length(model, length, options.rows, options.refreshes, options.steps)
        if options.peer is not None:
            timings += measure_peer(options.peer, model, length, 20)
    if options.json is not None:
        result = {
            "command": " ".join(["benchmarks/bench_step.py", *sys.argv[1:]]),
            "environment": where,
            "shape": asdict(model.config),
            "stream_bytes_per_second": rate,
            "weight_bytes": size,
            "steps": [asdict(timing) for timing in timings],
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
