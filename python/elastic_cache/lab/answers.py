"""One answer to one problem, and the file of answers that an interrupted run goes on from.

A file is JSON lines: first what the run is, then, in any order, the machines it ran on and the
answers. Several files of one folder are shards of one run. A last line that was cut off is the
answer that was being written when the run ended; it is asked again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COLD = -1
"""As a repeat: the first answer of a cell, which loads kernels and captures graphs."""


@dataclass(frozen=True)
class Answer:
    """What one cell made of one problem; times in seconds.

    Attributes:
        cell: its name.
        problem: index of the problem.
        repeat: which of several runs, or COLD.
        ids: generated tokens before the first EOS; prompt and tail are not among them.
        is_correct: whether the number after "####" is the right one.
        nfe: forwards.
        update_frequency: share of layer executions in full mode.
        seconds: from the tokenised prompt to the last commit.
        peak_bytes: the most device memory in use meanwhile, None on the CPU.
        step_seconds: of every step; empty for other projects, which do not tell.
        first_full_layers: of every step after the first.
        similarity: mean cosine of the drift test per layer, over the steps that tested it; None
            where no step did.
    """

    cell: str
    problem: int
    repeat: int
    ids: list[int]
    is_correct: bool
    nfe: int
    update_frequency: float
    seconds: float
    peak_bytes: int | None = None
    step_seconds: list[float] = field(default_factory=list)
    first_full_layers: list[int] = field(default_factory=list)
    similarity: list[float | None] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, int, int]:
        return self.cell, self.problem, self.repeat


@dataclass(frozen=True)
class Record:
    """Everything known of a run."""

    run: dict[str, Any]
    machines: list[dict[str, Any]]
    answers: list[Answer]


class AnswerFile:
    """Answers as they come, on disk if the run has a folder.

    Args:
        path: where to write; None keeps them in memory.
        run: what the run is. A file of another run is refused.

    Raises:
        ValueError: the file belongs to another run, or is broken.
    """

    def __init__(self, path: Path | None, run: dict[str, Any]) -> None:
        self._path = path
        self._record = Record(_plain(run), [], [])
        if path is None:
            return
        if path.exists():
            text = path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]
            if whole:
                self._record = parse(whole, path)
                check_same(self._record.run, run, path)
                if whole != text:
                    path.write_text(whole, encoding="utf-8")
                return
        path.write_text(_line("run", run), encoding="utf-8")

    @property
    def record(self) -> Record:
        return self._record

    def add_machine(self, machine: dict[str, Any]) -> None:
        self._record.machines.append(machine)
        self._append("machine", machine)

    def add(self, answer: Answer) -> None:
        self._record.answers.append(answer)
        self._append("answer", dataclasses.asdict(answer))

    def _append(self, kind: str, value: dict[str, Any]) -> None:
        if self._path is None:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(kind, value))
        except OSError as error:
            raise OSError(
                f"{self._path} cannot be written ({error.strerror}); what it holds is kept, and "
                "the same command goes on from there"
            ) from error


def read_folder(folder: Path) -> Record:
    """All shards of a run.

    Raises:
        ValueError: a file is broken, or two files are of different runs.
    """
    records = []
    for path in sorted(folder.glob("answers*.jsonl")):
        text = path.read_text(encoding="utf-8")
        records.append(parse(text[: text.rfind("\n") + 1], path))
        check_same(records[0].run, records[-1].run, path)
    if not records:
        raise ValueError(f"{folder} holds no answers*.jsonl")
    return Record(
        records[0].run,
        [machine for record in records for machine in record.machines],
        [answer for record in records for answer in record.answers],
    )


def parse(text: str, path: Path) -> Record:
    """The record that whole lines of a file hold."""
    run: dict[str, Any] | None = None
    machines, answers = [], []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            ((kind, value),) = json.loads(line).items()
            if kind == "run":
                run = value
            elif kind == "machine":
                machines.append(value)
            elif kind == "answer":
                answers.append(Answer(**value))
            else:
                raise ValueError(kind)
        except (ValueError, TypeError, AttributeError):
            raise ValueError(
                f"{path} is broken at line {number}: it is not an answer of the lab; remove that "
                "line, or take another folder"
            ) from None
    if run is None:
        raise ValueError(f"{path} does not say which run it is of: take another folder")
    return Record(run, machines, answers)


def check_same(run: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    """Refuses to go on with, or to report, what `path` holds of another run than the wanted one."""
    wanted = _plain(wanted)
    names: Sequence[str] = [*dict.fromkeys([*run, *wanted])]
    for name in names:
        if run.get(name) != wanted.get(name):
            raise ValueError(
                f"{path} is of another run, whose {name} is {run.get(name)!r} and not "
                f"{wanted.get(name)!r}: take another folder"
            )


def _line(kind: str, value: dict[str, Any]) -> str:
    return json.dumps({kind: value}, separators=(",", ":")) + "\n"


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """As it will be read back: tuples are lists then."""
    plain: dict[str, Any] = json.loads(json.dumps(value))
    return plain
