"""The sanitizer runner, with a stand-in for compute-sanitizer: it must fail whenever it should."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import sanitize
from sanitize import SELECTION, choose, collect, main, read_summary
from schemas import ROOT

INVALID = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at void elastic_cache::cuda::swiglu_kernel<float, 4>()+0x90
========= ERROR SUMMARY: 3 errors
"""
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"


@pytest.mark.parametrize(
    "log, found",
    [
        (CLEAN, 0),
        (INVALID, 3),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0),
        ("========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)\n", 1),
        ("========= COMPUTE-SANITIZER\n", None),
        ("", None),
    ],
)
def test_summaries(log: str, found: int | None) -> None:
    assert read_summary(log).found == found


def test_the_first_finding_is_quoted() -> None:
    assert read_summary(INVALID).lines[0] == "Invalid __global__ write of size 4 bytes"
    assert read_summary(CLEAN).lines == ()


def test_the_selection_covers_every_kernel() -> None:
    chosen = choose(collect())
    assert 50 < len(chosen) < 150 and not [test for test in chosen if "[cpu" in test]
    assert all(any(f"test_{op}.py" in test for test in chosen) for op in SELECTION)
    kernels = {path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")}
    operators = kernels - {"device_code", "stream_linear", "zero_bias"}
    assert operators <= SELECTION.keys()


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(SystemExit, match="of add_rms_norm in SELECTION matches no test"):
        choose(["tests/ops/test_swiglu.py::test_rows[cuda-float32-9]"])


def test_a_missing_tool_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: None)
    assert main([]) == 2
    assert "compute-sanitizer is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "logs, status, expected",
    [
        # The planted overrun, the tests, the probe; what the runner must make of them.
        ((INVALID, CLEAN, CLEAN), 0, 0),
        ((CLEAN, CLEAN, CLEAN), 0, 1),
        ((INVALID, INVALID, CLEAN), 0, 1),
        ((INVALID, CLEAN, INVALID), 0, 1),
        ((INVALID, CLEAN, ""), 0, 1),
        ((INVALID, CLEAN, CLEAN), 5, 1),
    ],
)
def test_exit_status(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    logs: tuple[str, str, str],
    status: int,
    expected: int,
) -> None:
    for name, log in zip(("planted-overrun", "swiglu", "attention-probe"), logs, strict=True):
        (tmp_path / name).write_text(log)
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        f"#!{sys.executable}\nimport pathlib, sys\n"
        "log = pathlib.Path(sys.argv[sys.argv.index('--log-file') + 1])\n"
        f"source = pathlib.Path({str(tmp_path)!r}) / log.stem.partition('-')[2]\n"
        f"log.write_text(source.read_text())\nsys.exit({status})\n"
    )
    tool.chmod(0o755)
    monkeypatch.setattr(sanitize, "LOGS", ROOT / "build" / "sanitize-test")
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: str(tool))
    monkeypatch.setattr(sanitize, "why_not", lambda sanitizer: None)
    monkeypatch.setattr(sanitize, "collect", lambda: [])
    monkeypatch.setattr(sanitize, "choose", lambda tests: ["tests/ops/test_swiglu.py::one"])
    assert main(["--tools", "memcheck", "--probe", str(tool)]) == expected
