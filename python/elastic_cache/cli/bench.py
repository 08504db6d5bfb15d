"""`elastic-cache bench`: the lab. Policies side by side on one machine, answers judged.

With --out every answer is on disk as soon as it is there: the same command goes on where a run
stopped, --report says what is there by now, and --shard lets several processes, each with a GPU of
its own, share one run.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic_cache.cli import options as shared
from elastic_cache.cli.table import format_table
from elastic_cache.config import POLICIES, GenerationConfig

if TYPE_CHECKING:
    from elastic_cache.cli.overhead import Overhead
    from elastic_cache.engine import Engine
    from elastic_cache.lab.answers import AnswerFile, Record
    from elastic_cache.lab.cells import Cell
    from elastic_cache.lab.session import Session, Turn
    from elastic_cache.lab.summary import Summary


def add_command(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="compare policies on this machine",
        description="Answers the same problems with several policies, in turns, and compares them.",
        epilog="A cell is policy[:setting=value]..., for example elastic:gamma=0.97 or "
        "fast-dllm:mode=dual; settings given as options hold for all cells.",
    )
    shared.add_model(parser)
    parser.add_argument(
        "--policies",
        default=",".join(POLICIES),
        metavar="A,B",
        help=f"cells to compare (default {','.join(POLICIES)})",
    )
    parser.add_argument(
        "--problems", type=int, default=8, metavar="N", help="number of problems (default 8)"
    )
    parser.add_argument(
        "--repeat", type=int, default=1, metavar="N", help="runs per problem (default 1)"
    )
    parser.add_argument(
        "--inflate", metavar="SHAPE", help="llada-8b: the model at that size, same answers"
    )
    parser.add_argument("--fast-dllm", metavar="FOLDER", help="a checkout, for cells of fast-dllm")
    parser.add_argument(
        "--out", metavar="FOLDER", help="answers, report and pictures; a stopped run goes on there"
    )
    parser.add_argument(
        "--shard", metavar="I/N", help="answer only every N-th problem, from the I-th on"
    )
    parser.add_argument(
        "--report", action="store_true", help="answer nothing: report what --out holds by now"
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
    from elastic_cache.lab.cells import read_cells

    given = {k: v for k, v in shared.read_settings(options).items() if v is not None}
    cells = read_cells(options.policies, given)
    part, parts = _check(options, cells)
    from elastic_cache.lab.answers import AnswerFile, check_same, read_folder
    from elastic_cache.lab.session import plan, turns_left

    run_of, out = _describe(options, cells), None if options.out is None else Path(options.out)
    engine = None
    if options.report:
        assert out is not None
        record = read_folder(out)
        check_same(record.run, run_of, out)
    else:
        name = "answers.jsonl" if parts == 1 else f"answers-{part}-of-{parts}.jsonl"
        file = AnswerFile(None if out is None else out / name, run_of)
        turns = plan(cells, range(part - 1, options.problems, parts), options.repeat)
        if left := turns_left(turns, file):
            engine = load_engine(options)
            _answer(engine, options, file, left)
        record = file.record if out is None else read_folder(out)
    overheads = (
        _overheads(engine or load_engine(options), options, cells) if options.overhead else []
    )
    _report(options, record, cells, overheads)
    return 0


def _check(options: argparse.Namespace, cells: Sequence[Cell]) -> tuple[int, int]:
    """Everything that can be refused before a model is loaded; the shard as (I, N)."""
    for name in ("problems", "repeat"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(options, name)}")
    if options.overhead and options.device != "cpu":
        raise ValueError(f"overhead is measured with device cpu only, got {options.device!r}")
    if options.json not in (None, "-") and not Path(options.json).absolute().parent.is_dir():
        raise ValueError(f"json must name a file in an existing folder, got {options.json!r}")
    if options.inflate is not None:
        from elastic_cache.models.inflate import SHAPES

        if options.inflate not in SHAPES:
            raise ValueError(f"inflate must be {', '.join(SHAPES)}, got {options.inflate!r}")
    if any(cell.is_peer for cell in cells):
        from elastic_cache.lab.fast_dllm import load_checkout

        if options.fast_dllm is None:
            raise ValueError("cells of fast-dllm need --fast-dllm FOLDER, a checkout of it")
        load_checkout(Path(options.fast_dllm))
    if options.report and (options.out is None or not Path(options.out).is_dir()):
        raise ValueError(f"report needs --out with the folder of a run, got {options.out!r}")
    if options.out is not None:
        Path(options.out).mkdir(parents=True, exist_ok=True)
    return _read_shard(options)


def _read_shard(options: argparse.Namespace) -> tuple[int, int]:
    if options.shard is None:
        return 1, 1
    found = re.fullmatch(r"(\d+)/(\d+)", options.shard)
    part, parts = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= part <= parts:
        raise ValueError(f"shard must be I/N with 1 <= I <= N, got {options.shard!r}")
    if options.out is None:
        raise ValueError("shard needs --out FOLDER: the shards of a run meet there")
    return part, parts


def _describe(options: argparse.Namespace, cells: Sequence[Cell]) -> dict[str, Any]:
    """What a run is: what must be equal for another process to go on with it."""
    names = ("model", "inflate", "dtype", "problems", "repeat")
    return {
        **{name: getattr(options, name) for name in names},
        "device": options.device.partition(":")[0],  # shards may have a GPU each
        "cells": {cell.name: dataclasses.asdict(cell.settings) for cell in cells},
    }


def load_engine(options: argparse.Namespace, batch_invariant: bool = False) -> Engine:
    """The model that the options name, at the size that `inflate` names."""
    from elastic_cache.engine import Engine, load

    if options.inflate is None:
        return load(options.model, options.device, options.dtype, batch_invariant=batch_invariant)
    from elastic_cache.device import find_device
    from elastic_cache.engine import find_dtype
    from elastic_cache.models.inflate import SHAPES, inflate

    device, dtype = find_device(options.device), find_dtype(options.dtype)
    model = inflate(load(options.model).model, SHAPES[options.inflate], device, dtype)
    return Engine(model, batch_invariant=batch_invariant)


def _answer(
    engine: Engine, options: argparse.Namespace, file: AnswerFile, turns: Sequence[Turn]
) -> None:
    from elastic_cache.lab.session import Session
    from elastic_cache.problems import HELD_OUT_SEED, problems

    if engine.model.tokenizer is None:
        raise ValueError(f"{options.model!r} has no tokenizer.json: the problems are texts")
    checkout = None
    if any(turn.cell.is_peer for turn in turns):
        checkout = Path(options.fast_dllm)
    session: Session = Session(engine, checkout, problems(HELD_OUT_SEED, options.problems))
    file.add_machine(environment(engine))
    for turn in _with_progress(turns):
        file.add(session.answer(turn))


def _overheads(
    engine: Engine, options: argparse.Namespace, cells: Sequence[Cell]
) -> list[Overhead]:
    from elastic_cache.cli.overhead import measure_overhead
    from elastic_cache.problems import HELD_OUT_SEED, problems

    question = problems(HELD_OUT_SEED, 1)[0][0]
    return [
        measure_overhead(engine, question, cell.settings)
        for cell in cells
        if isinstance(cell.settings, GenerationConfig)
    ]


def _report(
    options: argparse.Namespace,
    record: Record,
    cells: Sequence[Cell],
    overheads: Sequence[Overhead],
) -> None:
    from elastic_cache.lab.report import HEADER, as_json, machines, table
    from elastic_cache.lab.summary import summarize

    summary = summarize(cells, record.answers)
    if not summary.figures:
        raise ValueError("no problem has been answered: a shard begins at the I-th of the problems")
    values = {
        **as_json(record, summary, _command(options)),
        "overhead": [dataclasses.asdict(overhead) for overhead in overheads],
    }
    text = shared.write_json(values)
    if options.json == "-":
        print(text)
    else:
        print("\n".join([*machines(record), format_table(HEADER, table(summary))]))
        print("".join(f"{overhead}\n" for overhead in overheads), end="")
        if options.json:
            _write(Path(options.json), text + "\n")
    if options.out is not None:
        _write(Path(options.out) / "report.json", text + "\n")
        _illustrate(options, record, summary)


def _illustrate(options: argparse.Namespace, record: Record, summary: Summary) -> None:
    """The page and its pictures; the page is written also where pictures cannot be."""
    from elastic_cache.lab.plots import draw
    from elastic_cache.lab.report import markdown

    out, pictures = Path(options.out), list[str]()
    depth = max((len(answer.similarity) for answer in record.answers), default=0)
    try:
        pictures = draw(out, summary, record.answers, depth)
    except ImportError as error:
        print(f"note: {error}", file=sys.stderr)
    _write(out / "report.md", markdown(record, summary, _command(options), pictures))


def _command(options: argparse.Namespace) -> str:
    """How this run is asked for, without the places of files and the shard."""
    words = ["elastic-cache", "bench"]
    for name, value in vars(options).items():
        flag = "--" + name.replace("_", "-")
        if name in ("run", "out", "json", "shard", "report") or value is None or value is False:
            continue
        if name == "fast_dllm":
            words += [flag, "FOLDER"]
        elif name == "block_caching":
            continue
        elif value is True:
            words.append(flag)
        else:
            words += [flag, shlex.quote(str(value))]
    return " ".join([*words, *([] if options.block_caching else ["--no-block-caching"])])


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


def _with_progress(turns: Sequence[Turn]) -> Iterator[Turn]:
    """The turns, with a bar on standard error where that is a terminal."""
    if not sys.stderr.isatty():
        yield from turns
        return
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(turns, description="answering", console=console, transient=True)


def _write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
