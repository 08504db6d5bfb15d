"""The load generator: what it counts, and that a soak notices every kind of wrong answer."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from checkpoints import write_with_tokenizer
from elastic_cache.config import GenerationConfig
from elastic_cache.lab.cells import Cell
from schemas import ROOT


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("bench_serving")


@pytest.fixture
def load(bench: ModuleType) -> ModuleType:
    return import_module("serving_load")


@pytest.fixture
def soaking(bench: ModuleType) -> ModuleType:
    return import_module("serving_soak")


class FakeTarget:
    """Answers every question with its capitals; `tamper` may change the record."""

    def __init__(self, load: ModuleType, tamper: Callable[[int, Any], None] | None = None) -> None:
        self._load = load
        self._tamper = tamper
        self._lock = threading.Lock()
        self.asked = self.running = self.most = 0

    def ask(self, prompt: str) -> Any:
        with self._lock:
            number, self.asked = self.asked, self.asked + 1
            self.running += 1
            self.most = max(self.most, self.running)
        record = self._load.Record(prompt, time.perf_counter())
        time.sleep(0.002)
        record.text, record.tokens, record.queue = prompt.upper(), 4, 0.0
        if self._tamper is not None:
            self._tamper(number, record)
        record.ended = time.perf_counter()
        with self._lock:
            self.running -= 1
        return record

    def work(self) -> Any:
        return self._load.Work(self.asked, 30 * self.asked)


# load


def test_closed_loop_keeps_every_client_busy(load: ModuleType) -> None:
    target = FakeTarget(load)
    run = load.closed_loop(target, ["a", "b"], 3, 5, load.Limit(requests=40))
    assert target.most == 3
    assert len(run.counted) >= 40 and len(run.records) >= len(run.counted) + 5
    assert all(run.begin <= record.ended <= run.end for record in run.counted)
    assert run.work.rows == 30 * run.work.steps > 0
    assert {record.prompt for record in run.records} == {"a", "b"}


def test_open_loop_asks_also_what_is_not_answered_yet(load: ModuleType) -> None:
    def stall(number: int, record: Any) -> None:
        time.sleep(0.2)

    target = FakeTarget(load, stall)
    run = load.open_loop(target, ["a"], 200.0, 2, load.Limit(requests=10), seed=1)
    assert len(run.counted) == 10 and len(run.records) == 12
    assert target.most > 5, "arrivals do not wait for answers"


def test_arrivals_of_a_seed_are_the_same(load: ModuleType) -> None:
    def count(seed: int) -> int:
        run = load.open_loop(FakeTarget(load), ["a"], 300.0, 0, load.Limit(seconds=0.2), seed)
        return len(run.records)

    first = count(7)
    assert 30 < first < 100 and count(7) == first


def record_of(load: ModuleType, submitted: float, ended: float, **values: Any) -> Any:
    return load.Record("a", submitted, ended=ended, **values)


def test_tokens_count_as_far_as_they_lie_in_the_window(bench: ModuleType, load: ModuleType) -> None:
    """The window is 10 to 20: a half of the first request, all of the second, none of the third."""
    records = [
        record_of(load, 2.0, 15.0, queue=3.0, tokens=40, first_token=4.0, step_p50=0.1),
        record_of(load, 12.0, 14.0, queue=0.0, tokens=30, first_token=1.0, step_p50=0.3),
        record_of(load, 21.0, 22.0, queue=0.0, tokens=50),
        record_of(load, 12.0, 13.0, error="no", tokens=70),
    ]
    run = load.Run(10.0, 20.0, records, [records[0], records[1], records[3]], load.Work(5, 200))
    values = bench.figures(run)
    assert values["tokens_per_second"] == pytest.approx((20 + 30) / 10)
    assert values["requests_per_second"] == pytest.approx(1.5 / 10)
    assert values["num_counted"] == 2 and values["num_errors"] == 1
    assert (values["total_p50"], values["total_p99"]) == (2.0, 13.0)
    assert (values["queue_p50"], values["first_token_p95"]) == (0.0, 4.0)
    assert (values["step_p50"], values["step_p99"]) == (0.1, None)
    assert values["rows_per_step"] == 40


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 1.0), (0.5, 5.0), (0.95, 10.0), (0.9, 9.0), (1.0, 10.0)]
)
def test_quantile(load: ModuleType, share: float, expected: float) -> None:
    assert load.quantile([float(i) for i in range(10, 0, -1)], share) == expected


def test_quantile_of_nothing(load: ModuleType) -> None:
    assert load.quantile([], 0.5) is None


def test_rounds_go_back_and_forth(bench: ModuleType) -> None:
    cells = [Cell("a", GenerationConfig()), Cell("b", GenerationConfig())]
    turns = [(t.cell.name, t.batch, t.round) for t in bench.plan(cells, [1, 4], 2)]
    forth = [("a", 1), ("a", 4), ("b", 1), ("b", 4)]
    assert turns == [(*t, 0) for t in forth] + [(*t, 1) for t in reversed(forth)]


def test_medians_and_ratios_of_rounds(bench: ModuleType) -> None:
    cell = Cell("a", GenerationConfig())
    speeds = {1: [10.0, 20.0, 30.0], 4: [30.0, 20.0, None]}
    done = {
        bench.Turn(cell, batch, number): {"tokens_per_second": speed, "num_errors": 1}
        for batch, row in speeds.items()
        for number, speed in enumerate(row)
    }
    assert bench.ratios(done, cell, 4, 3) == [3.0, 1.0], "each with batch 1 of its own round"
    rounds = [done[bench.Turn(cell, 4, number)] for number in range(3)]
    assert bench.combine(rounds) == {"tokens_per_second": 25.0, "num_errors": 3}
    assert bench.ratios({k: v for k, v in done.items() if k.batch > 1}, cell, 4, 3) == []


def test_the_command_names_no_places(bench: ModuleType) -> None:
    given = "--model /data/m --url=http://host:1 --json /tmp/x --api-key=k --pid 7 --batch 1 2"
    assert bench.command(given.split()).split() == [
        "benchmarks/bench_serving.py", "--model", "MODEL", "--url", "URL", "--batch", "1", "2",
    ]  # fmt: skip
    assert bench.command(["--model", "tiny"]).endswith("--model tiny")


# soak

ANSWERS = {"one": "ONE", "two": "TWO", "three": "THREE"}


def swap(record: Any) -> None:
    record.text = "TWO" if record.prompt != "two" else "ONE"


def spoil(record: Any) -> None:
    record.text += "!"


def fail(record: Any) -> None:
    record.error = "it broke"


@pytest.mark.parametrize(
    ("fault", "kind"), [(swap, "mixed"), (spoil, "wrong"), (fail, "errors"), (None, None)]
)
def test_a_soak_notices_one_fault(
    load: ModuleType, soaking: ModuleType, fault: Callable[[Any], None] | None, kind: str | None
) -> None:
    def tamper(number: int, record: Any) -> None:
        if fault is not None and number == 20:
            fault(record)

    target = FakeTarget(load, tamper)
    verdict = soaking.soak(target, ANSWERS, 4, 0.3, lambda: 2**30, lambda: 0.5)
    assert verdict.requests == target.asked > 20 and target.most == 4
    counts = {name: getattr(verdict, name) for name in ("mixed", "wrong", "errors", "lost")}
    assert {name: count for name, count in counts.items() if count} == ({kind: 1} if kind else {})
    assert verdict.right == verdict.requests - sum(counts.values())
    assert len(verdict.examples) == sum(counts.values())
    assert verdict.is_good == (kind is None)
    assert (verdict.health_p50, verdict.health_p99) == (0.5, 0.5)
    assert f": {verdict.right} right, " in str(verdict)


def test_a_soak_misses_what_never_ends(
    load: ModuleType, soaking: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soaking, "GRACE", 0.2)
    end = threading.Event()

    def hang(number: int, record: Any) -> None:
        if number == 5:
            end.wait(60)

    verdict = soaking.soak(FakeTarget(load, hang), ANSWERS, 3, 0.2, None, None)
    end.set()
    assert verdict.lost == 1 and not verdict.is_good


def test_a_soak_notices_growing_memory_and_bad_health(
    load: ModuleType, soaking: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soaking, "SAMPLE_SECONDS", 0.01)
    sizes = iter(range(2**30, 2**40, 2**26))

    def sick() -> float:
        raise OSError("nobody there")

    verdict = soaking.soak(FakeTarget(load), ANSWERS, 2, 1.0, lambda: next(sizes), sick)
    assert verdict.growth > 2**27 and not verdict.is_flat and "NOT FLAT" in str(verdict)
    assert verdict.health_failures > 5 and not verdict.is_good
    verdict = soaking.Verdict(right=1, memory=[(float(i), 2**30 + i % 3) for i in range(20)])
    assert verdict.is_flat and verdict.is_good
    assert not soaking.Verdict().is_good, "a soak in which nothing was answered shows nothing"


# over HTTP

STATISTICS = {
    "finish_reason": "eos", "complete": True, "queue_seconds": 0.25, "first_token_seconds": 0.5,
    "step_p50_ms": 10.0, "step_p99_ms": 20.0,
}  # fmt: skip


def chunk(text: str = "", **more: Any) -> bytes:
    value = {"choices": [{"delta": {"content": text} if text else {}}], **more}
    return f"data: {json.dumps(value)}\n\n".encode()


WHOLE = [
    chunk("One "),
    chunk("é"),
    chunk("!", elastic_cache=STATISTICS),
    chunk(usage={"completion_tokens": 7}),
]
END = b"data: [DONE]\n\n"
STREAMS = {
    "whole": [*WHOLE, END],
    "broken": WHOLE,
    "failed": [WHOLE[0], b'data: {"error": {"message": "it failed"}}\n\n'],
    "late": [chunk("x", elastic_cache={**STATISTICS, "finish_reason": "deadline",
                                       "complete": False}), END],
}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    """Answers with the stream that the prompt names."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        is_known = prompt in STREAMS and body["stream"] and body["window"] == 4
        is_known = is_known and "seed" not in body and "Bearer k" in self.headers["Authorization"]
        self.send_response(200 if is_known else 429)
        self.end_headers()
        for part in STREAMS[prompt] if is_known else [b"too many"]:
            self.wfile.write(part)

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
        self.wfile.write(b'{"status": "ok"}')

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def target(load: ModuleType) -> Iterator[Any]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    yield load.HttpTarget(url, {"window": 4, "seed": None}, "k", 20.0)
    server.shutdown()
    server.server_close()


def test_a_stream_is_read(target: Any) -> None:
    record = target.ask("whole")
    assert record.error is None and record.text == "One é!" and record.tokens == 7
    assert (record.queue, record.first_token) == (0.25, 0.5)
    assert (record.step_p50, record.step_p99) == (0.01, 0.02)
    assert record.total > 0


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ("broken", "the stream broke off"),
        ("failed", "it failed"),
        ("late", "it ended by deadline"),
        ("other", "status 429: too many"),
    ],
)
def test_what_is_no_answer_is_an_error(target: Any, prompt: str, error: str) -> None:
    assert target.ask(prompt).error == error


def test_health_over_http(target: Any) -> None:
    seconds, body = target.get("/health")
    assert 0 < seconds < 20 and body == {"status": "ok"}
    with pytest.raises(OSError, match="/other answers 404"):
        target.get("/other")


def test_nobody_listens(load: ModuleType) -> None:
    target = load.HttpTarget("http://127.0.0.1:1", {}, None, 5.0)
    assert "refused" in target.ask("whole").error
    with pytest.raises(ValueError, match="url must be like"):
        load.HttpTarget("localhost:8000", {}, None, 5.0)


# the whole command


def run(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench_serving.py", *arguments])
    code: int = bench.main()
    return code


def test_a_table_and_a_file(
    bench: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Random weights, a few steps a request."""
    file = tmp_path / "out.json"
    fixed = ["--shape", "small", "--max-steps", "3", "--prompt-length", "8", "--gen-length", "16"]
    cells = ["--policies", "rolling:num_rows=20,elastic", "--batch", "1", "2"]
    some = ["--requests", "3", "--rounds", "2", "--tokens-per-step", "2", "--json", str(file)]
    assert run(bench, monkeypatch, *fixed, *cells, *some) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["rolling:num_rows=20", "1"], ["rolling:num_rows=20", "2"], ["elastic", "1"],
        ["elastic", "2"],
    ]  # fmt: skip
    results = json.loads(file.read_text())
    assert str(tmp_path) not in file.read_text() and results["environment"]["device"] == "cpu"
    for cell in results["cells"]:
        assert len(cell["rounds"]) == 2 and cell["num_counted"] >= 6 and cell["num_errors"] == 0
        assert 0 < cell["first_token_p50"] <= cell["total_p50"] <= cell["total_p99"]
        # Three steps commit two tokens each.
        ratio = cell["tokens_per_second"] / cell["requests_per_second"]
        assert ratio == pytest.approx(6, rel=1e-6)
        assert 16 <= cell["rows_per_step"] <= 24 * cell["batch"]
    assert results["cells"][0]["over_batch_1"] == 1


def test_requests_that_fail_are_told(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`dual` is not served: every request is refused."""
    fixed = ["--shape", "small", "--requests", "2", "--rounds", "1", "--batch", "1"]
    assert run(bench, monkeypatch, *fixed, "--policies", "dual") == 1
    captured = capsys.readouterr()
    assert "dual, batch 1: ValueError: policy 'dual' decodes one request" in captured.err
    assert captured.out.splitlines()[1].split()[2] == "0.0"


@pytest.mark.parametrize("is_spoilt", [False, True])
def test_a_soak_of_a_service(
    bench: ModuleType,
    load: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    is_spoilt: bool,
) -> None:
    """Every stream is the answer that the engine gives alone, and status 1 where it is not."""
    ask = load.ServiceTarget.ask

    def spoilt(self: Any, prompt: str) -> Any:
        record = ask(self, prompt)
        record.text = record.text[:-1]
        return record

    if is_spoilt:
        monkeypatch.setattr(load.ServiceTarget, "ask", spoilt)
    model = ["--model", str(write_with_tokenizer(tmp_path / "model")), "--gen-length", "24"]
    some = ["--soak", "1", "--clients", "6", "--problems", "4", "--batch", "3"]
    assert run(bench, monkeypatch, *model, *some) == (1 if is_spoilt else 0)
    out = capsys.readouterr().out
    assert (" 0 wrong, 0 mixed, 0 lost" in out) is not is_spoilt and "MiB at the start" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--seconds", "0"], "--seconds must be above 0"),
        (["--shape", "small", "--soak", "1"], "--shape has no texts"),
        (["--inflate", "gpt"], "--inflate must be llada-8b, got 'gpt'"),
        (["--soak", "1", "--max-steps", "3"], "compares whole answers"),
    ],
)
def test_wrong_options(
    bench: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    with pytest.raises(SystemExit):
        run(bench, monkeypatch, *arguments)
    assert words in capsys.readouterr().err
