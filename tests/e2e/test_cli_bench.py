"""`elastic-cache bench`: what it reports, how it goes on, and the measurement of overhead."""

from __future__ import annotations

import json
import os
from pathlib import Path

import elastic_cache
import pytest
from checkpoints import write_with_tokenizer
from elastic_cache.cli import main, overhead
from elastic_cache.config import GenerationConfig
from elastic_cache.lab.answers import Answer
from elastic_cache.lab.session import Session, Turn
from elastic_cache.problems import HELD_OUT_SEED

QUESTION = "Ava has 5 apples. Then Ava buys 3 more apples. How many apples does Ava have now?"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_with_tokenizer(tmp_path_factory.mktemp("models") / "random"))


BENCH = ["--gen-length", "24", "--problems", "2", "--window", "8"]


def test_bench(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    argv = ["bench", "--model", model, "--policies", "none,elastic:gamma=0.5", *BENCH]
    assert main([*argv, "--repeat", "2", "--json", str(file)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[1].split()[:3] == ["cell", "correct", "tok/s"]
    assert [line.split()[0] for line in table[2:]] == ["none", "elastic:gamma=0.5"]
    report = json.loads(file.read_text())
    assert os.listdir(tmp_path) == ["report.json"]
    none, elastic = report["cells"]
    assert elastic["agreement"]["reference"] == "none"
    assert report["run"]["cells"]["elastic:gamma=0.5"]["gamma"] == 0.5
    assert report["run"]["cells"]["none"]["window"] == 8 and report["machines"][0]["torch"]
    engine = elastic_cache.load(model)
    results = [
        engine.generate(question, gen_length=24, window=8, policy="none")
        for question, _ in elastic_cache.problems.problems(HELD_OUT_SEED, 2)
    ]
    assert none["num_tokens"] == sum(result.num_tokens for result in results)
    assert none["nfe"] == sum(result.nfe for result in results) / 2


def test_bench_json_alone(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--gen-length", "8", "--problems", "1", "--policies", "dual", "--json"]
    assert main(["bench", "--model", model, *settings]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ratios"] == {"dual": {}}


def test_bench_goes_on_where_it_stopped(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    argv = ["bench", "--model", model, "--policies", "none,rolling:num_rows=20", *BENCH]
    argv += ["--out", str(out)]
    answered = Session.answer
    count = 0

    def interrupted(self: Session, turn: Turn) -> Answer:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return answered(self, turn)

    monkeypatch.setattr(Session, "answer", interrupted)
    assert main(argv) == 130
    kept = (out / "answers.jsonl").read_text()
    assert main([*argv, "--report"]) == 0
    capsys.readouterr()
    report = json.loads((out / "report.json").read_text())
    assert [cell["num_problems"] for cell in report["cells"]] == [1]
    assert main(argv) == 0
    assert (out / "answers.jsonl").read_text().startswith(kept)
    # Two cold answers and one were kept; then two cold ones again and the three that were left.
    assert count == 4 + 5
    page, report = (out / "report.md").read_text(), json.loads((out / "report.json").read_text())
    assert [cell["num_problems"] for cell in report["cells"]] == [2, 2]
    assert "| rolling:num_rows=20 |" in page and str(tmp_path) not in page
    monkeypatch.setattr("elastic_cache.engine.load", None)  # nothing is left that needs it
    before = capsys.readouterr().out.splitlines()
    assert main(argv) == 0
    assert capsys.readouterr().out.splitlines() == before
    assert main([*argv, "--problems", "3"]) == 2
    assert "another run, whose problems is 2 and not 3" in capsys.readouterr().err


def test_bench_shards_meet(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "--model", model, "--policies", "none", *BENCH, "--out", str(tmp_path)]
    for shard in ("1/2", "2/2"):
        assert main([*argv, "--shard", shard]) == 0
    assert main([*argv, "--report"]) == 0  # and writes no file of answers of its own
    capsys.readouterr()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["cells"][0]["num_problems"] == 2
    assert sorted(path.name for path in tmp_path.glob("answers*")) == [
        "answers-1-of-2.jsonl",
        "answers-2-of-2.jsonl",
    ]


def test_overhead_is_bracketed(model: str) -> None:
    engine = elastic_cache.load(model)
    settings = GenerationConfig(gen_length=16, tokens_per_step=2)
    found = overhead.measure_overhead(engine, QUESTION, settings)
    assert found.num_steps == 7
    # Not that the share is positive: on a busy machine the profiled run can be the slower one.
    assert 0 < found.empty_kernel_ms <= found.kernel_ms
    assert found.share_low < found.share_high < 1
    assert found.share_low == pytest.approx(1 - found.kernel_ms / found.step_ms)
    busy = found.kernel_ms - found.empty_kernel_ms
    assert found.share_high == pytest.approx(1 - busy / found.step_ms)
