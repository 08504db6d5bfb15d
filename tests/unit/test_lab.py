"""The lab: cells as they are written, answers on disk, figures worked out by hand, pictures."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
from pathlib import Path
from typing import Any

import elastic_cache
import pytest
import torch
from elastic_cache.config import GenerationConfig
from elastic_cache.engine import Engine
from elastic_cache.lab import plots, report
from elastic_cache.lab.answers import COLD, Answer, AnswerFile, read_folder
from elastic_cache.lab.cells import Cell, PeerSettings, read_cells
from elastic_cache.lab.session import Session, Turn, plan, turns_left
from elastic_cache.lab.summary import (
    Summary,
    choose,
    paired_difference,
    quantile,
    speed_ratio,
    summarize,
    wilson,
)
from elastic_cache.problems import problems

RUN = {"model": "tiny", "inflate": None, "device": "cpu", "dtype": "float32", "problems": 2,
       "repeat": 1, "cells": {"none": {"window": 16}}}  # fmt: skip
MACHINE = {"gpu": None, "cpu": "some", "threads": 2, "torch": "2", "dtype": "float32",
           "elastic_cache": "0"}  # fmt: skip


def answer(cell: str = "none", problem: int = 0, repeat: int = 0, **values: Any) -> Answer:
    given = dict(ids=[7, 8], is_correct=True, nfe=2, update_frequency=0.5, seconds=1.0)
    return Answer(cell, problem, repeat, **{**given, **values})


# cells


def test_cells_have_common_and_own_settings() -> None:
    given = {"gen_length": 64, "threshold": 0.8, "window": 8}
    cells = read_cells("none, elastic:gamma=0.95:track_num=2,fast-dllm:mode=prefix", given)
    none, elastic, peer = (cell.settings for cell in cells)
    assert none == GenerationConfig(policy="none", gen_length=64, threshold=0.8, window=8)
    assert elastic == GenerationConfig(
        policy="elastic", gen_length=64, threshold=0.8, window=8, gamma=0.95, track_num=2
    )
    assert peer == PeerSettings(mode="prefix", gen_length=64, threshold=0.8)
    assert [cell.policy for cell in cells] == ["none", "elastic", "fast-dllm"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("none,none", "policies must name each cell once"),
        ("magic", "policy must be one of .*, got 'magic'"),
        ("elastic:gama=1", "elastic has no setting 'gama': did you mean gamma?"),
        ("elastic:policy=none", "has no setting 'policy'"),
        ("elastic:gamma", "after a colon comes setting=value, got 'gamma'"),
        ("elastic:gamma=x", "gamma must be a number, got 'x'"),
        ("elastic:window=1.5", "window must be a whole number, got '1.5'"),
        ("elastic:block_caching=no", "block_caching must be True or False, got 'no'"),
        ("fast-dllm:mode=all", "mode of fast-dllm must be one of none, prefix, dual, got 'all'"),
        ("fast-dllm:block_length=5", "a multiple of block_length, got 64 and 5"),
        ("fast-dllm:window=5", "fast-dllm has no setting 'window'"),
        ("fast-dllm:threshold=2", "threshold must be between 0 and 1, got 2.0"),
    ],
)
def test_wrong_cells(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_cells(text, {"gen_length": 64})


def test_the_full_recompute_of_a_cell_keeps_what_decides_tokens() -> None:
    given = {"gen_length": 64, "tokens_per_step": 2}
    rolling, peer = read_cells("rolling:window=4:num_rows=32,fast-dllm", given)
    assert rolling.full_recompute() == GenerationConfig(
        policy="none", gen_length=64, window=4, tokens_per_step=2
    )
    assert peer.full_recompute() == PeerSettings(mode="none", gen_length=64)


# turns


def test_cells_take_turns_after_a_cold_answer_each() -> None:
    a, b = read_cells("none,dual", {})
    turns = [(turn.cell.name, turn.problem, turn.repeat) for turn in plan([a, b], [3, 5], 2)]
    once = [("none", 3), ("dual", 3), ("none", 5), ("dual", 5)]
    cold = [("none", 3, COLD), ("dual", 3, COLD)]
    assert turns == [*cold, *((c, p, r) for r in (0, 1) for c, p in once)]
    assert plan([a, b], [], 2) == []


def test_a_run_goes_on_where_it_stopped_and_warms_up_again() -> None:
    (none,) = cells = read_cells("none", {})
    file = AnswerFile(None, RUN)
    turns = plan(cells, range(3), 1)
    assert turns_left(turns, file) == turns
    for turn in turns[:2]:
        file.add(answer(problem=turn.problem, repeat=turn.repeat))
    assert turns_left(turns, file) == [Turn(none, 0, COLD), Turn(none, 1, 0), Turn(none, 2, 0)]
    for turn in turns[2:]:
        file.add(answer(problem=turn.problem, repeat=turn.repeat))
    assert turns_left(turns, file) == []


# answers


class FakePeer:
    """Answers "#### 42", an EOS, and then more: what a decoder without a stop leaves there."""

    def __init__(self, engine: Engine) -> None:
        tokenizer, eos = engine.model.tokenizer, engine.model.config.eos_id
        assert tokenizer is not None
        self.answer = tokenizer.encode("#### 42")
        self.tail = [eos, *tokenizer.encode("#### 7"), eos]
        self.asked: list[tuple[object, ...]] = []

    def generate(self, prompt: torch.Tensor, *settings: object) -> tuple[torch.Tensor, int, float]:
        self.asked.append(settings)
        return torch.tensor([*prompt.tolist(), *self.answer, *self.tail]), 20, 0.5


def test_a_peers_answer_ends_at_its_first_eos() -> None:
    engine = elastic_cache.load("tiny")
    session = Session(engine, None, [("How many?", "#### 42"), ("How many?", "#### 7")])
    peer = session._peer = FakePeer(engine)  # type: ignore[assignment]
    dual, none = read_cells("fast-dllm,fast-dllm:mode=none", {"gen_length": 64})
    right, wrong = (session.answer(Turn(dual, problem, 0)) for problem in (0, 1))
    assert peer.asked == [("dual", 64, 32, 0.9)] * 2
    assert right.ids == peer.answer and right.is_correct and not wrong.is_correct
    # Two blocks begin with a full forward each; without a cache every forward is one.
    assert (right.nfe, right.seconds, right.update_frequency) == (20, 0.5, 0.1)
    assert session.answer(Turn(none, 0, 0)).update_frequency == 1.0


def test_our_answer_is_the_engines() -> None:
    engine = elastic_cache.load("tiny")
    ((question, solution),) = problems(seed=5, count=1)
    session = Session(engine, None, [(question, solution)])
    (cell,) = read_cells("elastic:gamma=0.97", {"gen_length": 48})
    got = session.answer(Turn(cell, 0, 0))
    want = engine.generate(question, gen_length=48, gamma=0.97, trace=True)
    assert want.trace is not None
    assert got.ids == want.ids[-48:][: want.num_tokens].tolist()
    assert (got.nfe, got.update_frequency) == (want.nfe, want.update_frequency)
    assert len(got.step_seconds) == got.nfe
    # The last step is over for its reader a moment after the answer is.
    assert 0 < sum(got.step_seconds[:-1]) <= got.seconds
    assert got.first_full_layers == [step.first_full_layer for step in want.trace[1:]]
    tested = [step.similarity[0] for step in want.trace if step.similarity]
    assert got.similarity[0] == pytest.approx(sum(tested) / len(tested), abs=1e-6)
    assert got.peak_bytes is None


# files


def test_answers_survive(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    given = answer(similarity=[0.5, None], step_seconds=[0.25], first_full_layers=[3])
    file = AnswerFile(path, RUN)
    file.add_machine(MACHINE)
    file.add(given)
    again = AnswerFile(path, RUN).record
    assert (again.run, again.machines, again.answers) == (RUN, [MACHINE], [given])


def test_a_cut_off_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    file = AnswerFile(path, RUN)
    file.add(answer())
    whole = path.read_text()
    file.add(answer(problem=1))
    path.write_text(path.read_text()[:-9])
    file = AnswerFile(path, RUN)
    assert file.record.answers == [answer()] and path.read_text() == whole
    path.write_text(whole.splitlines()[0][:5])  # not even the first line
    assert AnswerFile(path, RUN).record.answers == []


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"answer": {"cell": "none"}}', '{"other": {}}', '{"a": 1, "b": 2}', ""]
)
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "answers.jsonl"
    AnswerFile(path, RUN).add(answer())
    path.write_text(path.read_text() + line + "\n" + "{}\n")
    with pytest.raises(ValueError, match="answers.jsonl is broken at line 3"):
        AnswerFile(path, RUN)


def test_a_file_without_its_run(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"machine": MACHINE}) + "\n")
    with pytest.raises(ValueError, match="does not say which run it is of"):
        AnswerFile(path, RUN)


def test_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    AnswerFile(path, RUN)
    with pytest.raises(ValueError, match="another run, whose problems is 2 and not 3"):
        AnswerFile(path, {**RUN, "problems": 3})


def test_shards_of_a_run_meet(tmp_path: Path) -> None:
    for part in (1, 2):
        file = AnswerFile(tmp_path / f"answers-{part}-of-2.jsonl", RUN)
        file.add(answer(problem=part))
    assert [a.problem for a in read_folder(tmp_path).answers] == [1, 2]
    AnswerFile(tmp_path / "answers-3.jsonl", {**RUN, "dtype": "bfloat16"})
    with pytest.raises(ValueError, match="answers-3.jsonl is of another run, whose dtype"):
        read_folder(tmp_path)
    with pytest.raises(ValueError, match="holds no answers"):
        read_folder(tmp_path / "nowhere")


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = AnswerFile(tmp_path / "answers.jsonl", RUN)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="cannot be written .No space left on device.; .* goes on"):
        file.add(answer())


# figures


def test_wilson_and_paired_intervals() -> None:
    # Worked out with z = 1.96: 45 of 50 gives 78.6 to 95.7 %.
    share = wilson(45, 50)
    assert (share.value, share.low, share.high) == pytest.approx((0.9, 0.7864, 0.9565), abs=1e-4)
    assert (wilson(0, 10).low, wilson(10, 10).high) == pytest.approx((0.0, 1.0))
    # 4 lost and 1 won of 100: -3 points, variance (0.05 - 0.0009) / 100.
    half = 1.959964 * math.sqrt((0.05 - 0.0009) / 100)
    difference = paired_difference(4, 1, 100)
    assert (difference.value, difference.low, difference.high) == pytest.approx(
        (-0.03, -0.03 - half, -0.03 + half)
    )


def test_quantiles() -> None:
    assert quantile([1.0, 2.0, 3.0, 4.0, 5.0], 0.5) == 3.0
    assert quantile([1.0, 2.0], 0.25) == 1.25
    assert quantile([7.0], 0.99) == 7.0
    assert quantile([], 0.5) is None


def test_the_median_of_repeats_counts_and_cold_answers_do_not() -> None:
    times = [(COLD, 90.0), (0, 9.0), (1, 4.0), (2, 5.0)]
    answers = [answer(repeat=repeat, seconds=seconds) for repeat, seconds in times]
    assert choose("none", answers)[0].seconds == 5.0
    assert choose("dual", answers) == {}


def test_speed_ratio_is_of_common_problems() -> None:
    one = {0: answer(seconds=1.0), 1: answer(seconds=1.0), 2: answer(seconds=50.0)}
    other = {0: answer(seconds=3.0), 1: answer(seconds=3.0)}
    ratio = speed_ratio(one, other)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((3.0, 3.0, 3.0))


def lab_answers() -> tuple[list[Cell], list[Answer]]:
    cells = read_cells("none,elastic,elastic:window=4", {})
    answers = [
        answer(seconds=8.0, repeat=COLD),
        answer(problem=0, ids=[1, 2, 3, 4], nfe=4, seconds=2.0, step_seconds=[1.0, 0.5, 0.5]),
        answer(problem=1, ids=[1, 2], nfe=2, seconds=1.0, is_correct=False),
        answer("elastic", 0, ids=[1, 2, 9], nfe=3, seconds=1.0, is_correct=False,
               first_full_layers=[2, 1, 0], similarity=[0.5, None], peak_bytes=5),
        answer("elastic", 1, ids=[1, 2], nfe=2, seconds=0.5, first_full_layers=[2],
               similarity=[0.7, 0.9], peak_bytes=7),
        answer("elastic:window=4", 0),
    ]  # fmt: skip
    return cells, answers


def test_figures() -> None:
    cells, answers = lab_answers()
    summary = summarize(cells, answers)
    none, elastic, narrow = summary.figures
    assert (none.num_problems, none.num_tokens, none.nfe, none.seconds) == (2, 6, 3.0, 3.0)
    assert (none.correct.value, none.tokens_per_second.value) == (0.5, 2.0)
    assert (none.cold_seconds, none.tokens_per_forward) == (8.0, 1.0)
    assert (none.first_step_ms, none.step_ms_p50, none.step_ms_p99) == (1000.0, 500.0, 500.0)
    assert none.agreement is None and none.peak_bytes is None
    assert elastic.peak_bytes == 7 and elastic.cold_seconds is None
    agreement = elastic.agreement
    assert agreement is not None and agreement.reference == "none"
    # Of 4 + 2 positions 2 + 2 are equal; one answer was lost, the other one won.
    assert agreement.tokens_equal == pytest.approx(4 / 6)
    assert (agreement.num_lost, agreement.num_won, agreement.difference.value) == (1, 1, 0.0)
    assert narrow.agreement is None  # no full recompute with its window
    ratio = summary.ratios["elastic"]["none"]
    assert ratio.value == pytest.approx((5 / 1.5) / (6 / 3))
    assert summary.ratios["none"]["elastic"].value == pytest.approx(1 / ratio.value)


def test_update_frequency_weighs_forwards() -> None:
    cells = read_cells("none", {})
    answers = [
        answer(nfe=1, update_frequency=1.0),
        answer(problem=1, nfe=3, update_frequency=0.2),
    ]
    assert summarize(cells, answers).figures[0].update_frequency == pytest.approx(0.4)


def test_a_cell_without_answers_is_left_out() -> None:
    cells = read_cells("none,dual", {})
    summary = summarize(cells, [answer()])
    assert [figures.cell for figures in summary.figures] == ["none"]
    assert summarize(cells, []) == Summary([], {})


# pages and pictures


def test_page_and_json_say_the_same() -> None:
    cells, answers = lab_answers()
    file = AnswerFile(None, RUN)
    file.add_machine(MACHINE)
    summary = summarize(cells, answers)
    page = report.markdown(file.record, summary, "the command", ["a.png"])
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| elastic |")]
    assert rows[0][1] == "50.0% (9.5 to 90.5) of 2"
    assert "`the command`" in page and "![a.png](a.png)" in page and "tiny, float32 on cpu" in page
    values = report.as_json(file.record, summary, "the command")
    assert values["cells"][1] == dataclasses.asdict(summary.figures[1])
    assert values["ratios"]["elastic"]["none"]["value"] == pytest.approx(5 / 3)


def test_refreshed_share_and_drift() -> None:
    _, answers = lab_answers()
    elastic = list(choose("elastic", answers).values())
    share = plots.refreshed_share(elastic, 2)
    # Step 1: neither; step 2: layer 1 of the one still running; step 3: both layers.
    assert torch.equal(share, torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0]]))
    assert plots.mean_similarity(elastic) == pytest.approx([0.6, 0.9])


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cells, answers = lab_answers()
    names = plots.draw(tmp_path, summarize(cells, answers), answers, depth=2)
    assert names == [plots.SPEED, plots.REFRESHES, plots.DRIFT]
    for name in names:
        data = (tmp_path / name).read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 5000
    untested = [a for a in answers if a.cell == "none"]
    assert plots.draw(tmp_path, summarize(cells, untested), untested, depth=0) == [plots.SPEED]
