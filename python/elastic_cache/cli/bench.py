"""`elastic-cache bench`: policies side by side on one machine.

The arms take turns problem by problem (A B C, A B C, ...), so that what else the machine does hits
all of them alike. With --repeat, the run with the median time stands for each problem. Tokens are
counted to the first EOS. Speed-up is the ratio of tokens per second to policy `none`, which runs
with the same window, threshold and EOS rule.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic_cache.cli import options as shared
from elastic_cache.cli.table import format_table
from elastic_cache.config import POLICIES, GenerationConfig

if TYPE_CHECKING:
    from elastic_cache.cli.overhead import Overhead
    from elastic_cache.engine import Engine

_WARM_UP_STEPS = 4


@dataclass(frozen=True)
class Run:
    """One problem answered once."""

    num_tokens: int
    nfe: int
    update_frequency: float
    seconds: float
    is_correct: bool
    step_seconds: tuple[float, ...]


@dataclass(frozen=True)
class Arm:
    """One policy over all problems; totals over the problems, milliseconds over all steps."""

    policy: str
    num_tokens: int
    nfe: int
    tokens_per_forward: float
    update_frequency: float
    seconds: float
    tokens_per_second: float
    speed_up: float | None
    step_ms_p50: float
    step_ms_p95: float
    num_correct: int
    num_problems: int


def add_command(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="compare policies on this machine",
        description="Answers the same problems with several policies, in turns, and compares them.",
    )
    shared.add_model(parser)
    parser.add_argument(
        "--policies",
        default=",".join(POLICIES),
        metavar="A,B",
        help=f"policies to compare (default {','.join(POLICIES)})",
    )
    parser.add_argument(
        "--problems", type=int, default=8, metavar="N", help="number of problems (default 8)"
    )
    parser.add_argument(
        "--repeat", type=int, default=1, metavar="N", help="runs per problem (default 1)"
    )
    parser.add_argument(
        "--overhead",
        action="store_true",
        help="also measure the share of a step spent outside kernels and matrix products",
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write JSON to FILE beside the table, or alone to standard output",
    )
    shared.add_settings(parser, gen_length=256)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    policies = _read_policies(options)
    for name in ("problems", "repeat"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(options, name)}")
    if options.overhead and options.device != "cpu":
        raise ValueError(f"overhead is measured with device cpu only, got {options.device!r}")
    if options.json not in (None, "-") and not Path(options.json).absolute().parent.is_dir():
        raise ValueError(f"json must name a file in an existing folder, got {options.json!r}")
    from elastic_cache.engine import load
    from elastic_cache.problems import HELD_OUT_SEED
    from elastic_cache.problems import problems as make_problems

    engine = load(options.model, device=options.device, dtype=options.dtype)
    problems = make_problems(HELD_OUT_SEED, options.problems)
    runs = _alternate(engine, problems, policies, options.repeat)
    arms = summarize(runs)
    overheads = _overheads(engine, problems[0][0], policies) if options.overhead else []
    where = environment(engine)
    report = {
        "environment": where,
        "settings": {
            **dataclasses.asdict(next(iter(policies.values()))),
            "policy": list(policies),
            "model": options.model,
            "problems": options.problems,
            "repeat": options.repeat,
        },
        "arms": [dataclasses.asdict(arm) for arm in arms],
        "overhead": [dataclasses.asdict(overhead) for overhead in overheads],
    }
    if options.json == "-":
        print(shared.write_json(report))
        return 0
    print(_format(where, arms, overheads))
    if options.json:
        _write(Path(options.json), shared.write_json(report) + "\n")
    return 0


def _read_policies(options: argparse.Namespace) -> dict[str, GenerationConfig]:
    names = [name.strip() for name in options.policies.split(",")]
    if len(set(names)) < len(names):
        raise ValueError(f"policies must name each policy once, got {options.policies!r}")
    settings = shared.read_settings(options)
    return {name: GenerationConfig(policy=name, **settings) for name in names}


def _alternate(
    engine: Engine,
    problems: Sequence[tuple[str, str]],
    policies: dict[str, GenerationConfig],
    repeat: int,
) -> dict[str, list[list[Run]]]:
    """Runs per policy and problem, policies taking turns."""
    for settings in policies.values():
        _warm_up(engine, problems[0][0], settings)
    runs: dict[str, list[list[Run]]] = {policy: [[] for _ in problems] for policy in policies}
    plan = [
        (policy, index)
        for _ in range(repeat)
        for index in range(len(problems))
        for policy in policies
    ]
    for policy, index in _with_progress(plan):
        question, answer = problems[index]
        runs[policy][index].append(answer_once(engine, question, answer, policies[policy]))
    return runs


def _warm_up(engine: Engine, question: str, settings: GenerationConfig) -> None:
    request = engine.stream(question, **dataclasses.asdict(settings))
    for _ in islice(request, _WARM_UP_STEPS):
        pass


def answer_once(engine: Engine, question: str, answer: str, settings: GenerationConfig) -> Run:
    """One timed answer, judged by the number after '####'."""
    from elastic_cache.problems import final_number

    request = engine.stream(question, **dataclasses.asdict(settings))
    times = [time.perf_counter()]
    for _ in request:
        times.append(time.perf_counter())
    result = request.result
    return Run(
        result.num_tokens,
        result.nfe,
        result.update_frequency,
        result.seconds,
        final_number(result.text or "") == final_number(answer),
        tuple(end - start for start, end in pairwise(times)),
    )


def summarize(runs: dict[str, list[list[Run]]]) -> list[Arm]:
    """Totals per policy; of repeated runs, the one with the median time counts."""
    arms = [_summarize_arm(policy, problems) for policy, problems in runs.items()]
    none = next((arm.tokens_per_second for arm in arms if arm.policy == "none"), 0.0)
    if not none:
        return arms
    return [dataclasses.replace(arm, speed_up=arm.tokens_per_second / none) for arm in arms]


def _summarize_arm(policy: str, problems: list[list[Run]]) -> Arm:
    chosen = [
        sorted(repeats, key=lambda run: run.seconds)[(len(repeats) - 1) // 2]
        for repeats in problems
    ]
    tokens, nfe = sum(run.num_tokens for run in chosen), sum(run.nfe for run in chosen)
    seconds = sum(run.seconds for run in chosen)
    steps = [1e3 * seconds for run in chosen for seconds in run.step_seconds]
    # Twenty equal parts have 19 borders: the tenth is the median, the last the 95th percentile.
    borders = statistics.quantiles(steps, n=20, method="inclusive") if len(steps) > 1 else steps
    return Arm(
        policy=policy,
        num_tokens=tokens,
        nfe=nfe,
        tokens_per_forward=tokens / nfe,
        update_frequency=sum(run.update_frequency * run.nfe for run in chosen) / nfe,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        speed_up=None,
        step_ms_p50=statistics.median(steps),
        step_ms_p95=borders[-1],
        num_correct=sum(run.is_correct for run in chosen),
        num_problems=len(chosen),
    )


def _overheads(
    engine: Engine, question: str, policies: dict[str, GenerationConfig]
) -> list[Overhead]:
    from elastic_cache.cli.overhead import measure_overhead

    return [measure_overhead(engine, question, settings) for settings in policies.values()]


def environment(engine: Engine) -> dict[str, Any]:
    """What the numbers depend on."""
    import torch

    import elastic_cache

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(engine.model.device)
        if engine.model.device.type == "cuda"
        else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "elastic_cache": elastic_cache.__version__,
        "device": str(engine.model.device),
        "dtype": str(engine.model.dtype).removeprefix("torch."),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.*)$", info.read_text(), re.M) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _with_progress(plan: list[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """The plan's entries, with a bar on standard error where that is a terminal."""
    if not sys.stderr.isatty():
        yield from plan
        return
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(plan, description="answering", console=console, transient=True)


def _format(env: dict[str, Any], arms: list[Arm], overheads: list[Overhead]) -> str:
    header = (
        "policy",
        "tokens",
        "forwards",
        "tok/fwd",
        "updates",
        "seconds",
        "tok/s",
        "speed-up",
        "ms p50",
        "ms p95",
        "correct",
    )
    rows = [
        (
            arm.policy,
            f"{arm.num_tokens}",
            f"{arm.nfe}",
            f"{arm.tokens_per_forward:.2f}",
            f"{arm.update_frequency:.1%}",
            f"{arm.seconds:.2f}",
            f"{arm.tokens_per_second:.1f}",
            "-" if arm.speed_up is None else f"{arm.speed_up:.2f}x",
            f"{arm.step_ms_p50:.2f}",
            f"{arm.step_ms_p95:.2f}",
            f"{arm.num_correct}/{arm.num_problems}",
        )
        for arm in arms
    ]
    where = (
        f"{env['gpu'] or env['cpu']}, {env['threads']} threads, torch {env['torch']}, "
        f"{env['dtype']}"
    )
    return "\n".join([where, format_table(header, rows), *map(str, overheads)])


def _write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
