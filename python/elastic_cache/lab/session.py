"""Asks the problems, cell after cell, and judges the answers.

The cells take turns problem by problem (A B C, A B C, ...), so that whatever else the machine does
hits all of them alike.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from elastic_cache.lab.answers import COLD, Answer, AnswerFile
from elastic_cache.lab.cells import Cell, PeerSettings
from elastic_cache.problems import final_number
from elastic_cache.prompt import encode_prompt

if TYPE_CHECKING:
    from elastic_cache.engine import Engine
    from elastic_cache.lab.fast_dllm import FastDLLM
    from elastic_cache.types import Step


@dataclasses.dataclass(frozen=True)
class Turn:
    """One cell, one problem, once."""

    cell: Cell
    problem: int
    repeat: int


def plan(cells: Sequence[Cell], problems: Iterable[int], repeat: int) -> list[Turn]:
    """All turns of a run; every cell's first one is cold."""
    indices = list(problems)
    if not indices:
        return []
    cold = [Turn(cell, indices[0], COLD) for cell in cells]
    warm = [Turn(cell, i, r) for r in range(repeat) for i in indices for cell in cells]
    return [*cold, *warm]


def turns_left(turns: Sequence[Turn], file: AnswerFile) -> list[Turn]:
    """Those without an answer. A process that goes on is cold again: its cells warm up anew."""
    done = {answer.key for answer in file.record.answers}
    left = [turn for turn in turns if (turn.cell.name, turn.problem, turn.repeat) not in done]
    if not left or left[0].repeat == COLD:
        return left
    return [*[turn for turn in turns if turn.repeat == COLD], *left]


class Session:
    """Answers turns with one loaded model.

    Args:
        engine: answers for our policies.
        checkout: a folder with Fast-dLLM; only for cells that run it.
        problems: (question, answer) by index.
    """

    def __init__(
        self, engine: Engine, checkout: Path | None, problems: Sequence[tuple[str, str]]
    ) -> None:
        self._engine = engine
        self._problems = problems
        self._peer: FastDLLM | None = None
        if checkout is not None:
            from elastic_cache.lab.fast_dllm import FastDLLM

            model = engine.model
            self._peer = FastDLLM(checkout, model.config, model.weights, model.device)

    def answer(self, turn: Turn) -> Answer:
        """One answer, timed and judged."""
        question, solution = self._problems[turn.problem]
        self._reset_peak()
        ask: Callable[[str, Turn], Answer] = self._ask_peer if turn.cell.is_peer else self._ask
        answer = ask(question, turn)
        tokenizer = self._engine.model.tokenizer
        assert tokenizer is not None  # the problems are texts
        is_correct = final_number(tokenizer.decode(answer.ids)) == final_number(solution)
        return dataclasses.replace(answer, is_correct=is_correct, peak_bytes=self._peak())

    def _ask(self, question: str, turn: Turn) -> Answer:
        request = self._engine.stream(question, **dataclasses.asdict(turn.cell.settings))
        times, steps = [time.perf_counter()], []
        for step in request:
            times.append(time.perf_counter())
            steps.append(step)
        result = request.result
        start = len(result.ids) - result.settings["gen_length"]
        return Answer(
            cell=turn.cell.name,
            problem=turn.problem,
            repeat=turn.repeat,
            ids=result.ids[start : start + result.num_tokens].tolist(),
            is_correct=False,
            nfe=result.nfe,
            update_frequency=result.update_frequency,
            seconds=result.seconds,
            step_seconds=[round(end - begin, 7) for begin, end in pairwise(times)],
            first_full_layers=[step.first_full_layer for step in steps[1:]],
            similarity=_mean_similarity(steps),
        )

    def _ask_peer(self, question: str, turn: Turn) -> Answer:
        settings = turn.cell.settings
        assert self._peer is not None and isinstance(settings, PeerSettings)
        model = self._engine.model
        prompt = encode_prompt(model, question, settings.gen_length)
        ids, nfe, seconds = self._peer.generate(
            prompt.ids[: prompt.text_start],
            settings.mode,
            settings.gen_length,
            settings.block_length,
            settings.threshold,
        )
        answer = ids[prompt.text_start :].tolist()
        eos = model.config.eos_id
        end = answer.index(eos) if eos in answer else len(answer)
        return Answer(
            cell=turn.cell.name,
            problem=turn.problem,
            repeat=turn.repeat,
            ids=answer[:end],
            is_correct=False,
            nfe=nfe,
            update_frequency=_peer_updates(settings, nfe),
            seconds=seconds,
        )

    def _reset_peak(self) -> None:
        if self._engine.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._engine.model.device)

    def _peak(self) -> int | None:
        device = self._engine.model.device
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _mean_similarity(steps: Sequence[Step]) -> list[float | None]:
    """Per layer, over the steps that tested it."""
    depth = max((len(step.similarity) for step in steps), default=0)
    means: list[float | None] = []
    for layer in range(depth):
        tested = [step.similarity[layer] for step in steps if len(step.similarity) > layer]
        means.append(round(math.fsum(tested) / len(tested), 6) if tested else None)
    return means


def _peer_updates(settings: PeerSettings, nfe: int) -> float:
    """Share of its forwards that compute every position: all, or one for every block."""
    num_blocks = settings.gen_length // settings.block_length
    return 1.0 if settings.mode == "none" else num_blocks / nfe
