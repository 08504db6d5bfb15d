"""The CUDA kernels under compute-sanitizer: memory errors and races in shared memory.

    make sanitize     or     python tests/sanitize.py --probe build/cpp/tests/cuda/attention_probe

Needs a GPU, a build with CUDA kernels and compute-sanitizer. Only kernels of this project are
instrumented: torch's are many, slow to check, and not ours. Three things keep "no errors" from
being empty: SELECTION must match tests for every operator with a kernel, every run must end with
the tool's own summary, and memcheck must find a write that the probe makes out of bounds.

An operator's tests are one run, and several run at a time: a fault ends one operator's alone.

Exit status: 0 nothing found; 1 something found, or a test failed; 2 it could not be run.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "sanitize"
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q")
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
TIMEOUT = 600

SELECTION: dict[str, tuple[str, ...]] = {
    "add_rms_norm": (r"rows\[.*-(0|9)\]", r"widths\[.*-(7|64|4096)\]", r"optional_arguments\["),
    "cache_write": (
        r"sizes\[.*-9\]",
        r"heads\[.*-(6|128)-\(6, 2\)\]",
        r"without_saving\[",
        r"segments\[",
    ),
    "commit": (r"sizes\[.*-(65|2000)\]", r"eos_drops.*\[", r"nan_commits_nothing.*\["),
    "drift_attention": (r"tracked_rows\[.*-17\]", r"no_row_and_no_key\["),
    "drift_statistics": (
        r"tracked_rows\[.*-(0|17|65)\]",
        r"heads\[.*-(64|128)-\(6, 2\)\]",
        r"keys\[.*-129\]",
        r"whole_tiles.*\[",
    ),
    "drift_decision": (r"sizes\[.*-(1|3000)\]", r"track_num\[.*-(17|50)\]"),
    # Not bfloat16's rows: under racecheck the vendor's product with a bias is an illegal access,
    # also in torch.addmm alone (torch 2.11.0+cu130, compute-sanitizer 2025.3.1).
    "linear": (r"batch_invariant\[.*bfloat16-",),
    "output_mlp": (
        r"rows\[.*float32-17\]",
        r"streamed_weights\[.*-(17|65|150)\]",
        r"batch_invariant\[.*bfloat16\]",
    ),
    "project_qkv": (r"rows\[.*-17\]", r"all_rows_skipped\["),
    "refresh_rows": (r"sizes\[.*-(65|5000)\]", r"exactly_full.*\["),
    "rolling_rows": (r"sizes\[.*-(65|4096)\]", r"budgets\[.*-17\]"),
    "select_rows": (
        r"sizes\[.*-(65|4096)\]",
        r"windows\[.*-17\]",
        r"exactly_full.*\[",
        r"many_sequences\[.*-33-48\]",
    ),
    "swiglu": (r"rows\[.*-(0|9)\]", r"widths\[.*-(7|12288)\]"),
    "token_confidence": (r"rows\[.*-3\]", r"vocabularies\[.*-(17|1000)\]", r"no_possible_token\["),
    "window_attention": (
        r"rows\[.*-(1|17)\]",
        r"keys\[.*-(1|129|2000)\]",
        r"heads\[.*-(64|80|128)-\(9, 3\)\]",
        r"no_key\[",
        r"many_sequences\[.*bfloat16-(any|grouped)-128-\(32, 32\)-(4|16)\]",
        r"unequal_sequences\[.*bfloat16-",
    ),
}
"""Tests of each operator, without `test_`: every kernel, with packs and without, a tile and more,
nothing to do, rows that are skipped. `--all` runs the whole CUDA side in place of it."""


@dataclass(frozen=True)
class Summary:
    """What a tool says at the end of its log; None = it did not come to its end."""

    found: int | None
    lines: tuple[str, ...]  # the first finding


def read_summary(log: str) -> Summary:
    """Errors (memcheck, synccheck, initcheck) or hazards, warnings included (racecheck)."""
    counts = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", log)
    found = sum(int(errors or hazards) for errors, hazards in counts) if counts else None
    lines = [line.removeprefix("=========").strip() for line in log.splitlines()]
    lines = [line for line in lines if line and "COMPUTE-SANITIZER" not in line]
    return Summary(found, tuple(lines[:12]) if found != 0 else ())


def choose(collected: Iterable[str]) -> list[str]:
    """The tests of SELECTION among collected ids; each of its patterns must match one."""
    tests = [test for test in collected if "[cuda" in test]
    chosen: list[str] = []
    for op, patterns in SELECTION.items():
        for pattern in patterns:
            full = rf"tests/ops/test_{op}\.py::test_{pattern}.*"
            matching = [test for test in tests if re.fullmatch(full, test)]
            if not matching:
                raise SystemExit(f"sanitize: {pattern!r} of {op} in SELECTION matches no test")
            chosen += matching
    return list(dict.fromkeys(chosen))


def by_operator(tests: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for test in tests:
        groups.setdefault(Path(test.partition("::")[0]).stem.removeprefix("test_"), []).append(test)
    return groups


def collect() -> list[str]:
    """Ids of all operator tests."""
    command = [*PYTEST, "--collect-only", "tests/ops"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"sanitize: the operator tests cannot be collected:\n{done.stdout}")
    return [line for line in done.stdout.splitlines() if "::" in line]


def find_sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [f"{home}/{sub}" for home in homes if home for sub in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(folders)
    )


def why_not(sanitizer: str | None) -> str | None:
    """What is missing to run at all."""
    if sanitizer is None:
        return (
            "compute-sanitizer is not installed: it comes with the CUDA toolkit "
            "(apt-get install cuda-sanitizer-13-0, for example); nothing was checked"
        )
    from elastic_cache.device import survey, why_unusable

    problem = why_unusable(survey([0]), 0)
    return None if problem is None else f"{problem.reason}: {problem.fix}; nothing was checked"


@dataclass(frozen=True)
class Run:
    """What a command under a tool came to."""

    summary: Summary
    status: int  # the command's own exit status
    seconds: float


def sanitize(sanitizer: str, tool: str, what: str, command: Sequence[str]) -> Run:
    began = time.monotonic()
    log = LOGS / f"{tool}-{what.replace(' ', '-')}.log"
    log.unlink(missing_ok=True)
    options = ["--tool", tool, "--log-file", str(log), "--kernel-name"]
    options += ["kernel_substring=elastic_cache", "--print-limit", "50"]
    if tool == "memcheck":
        # Tests that break arguments on purpose make CUDA calls fail; those are not findings.
        options += ["--report-api-errors", "no"]
    # Without torch's cache every tensor is an allocation of its own, with its own bounds.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
    output = LOGS / f"{tool}-{what.replace(' ', '-')}.out"
    with output.open("w") as out:
        try:
            status = subprocess.run(
                [sanitizer, *options, *command],
                cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, timeout=TIMEOUT,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            status = 124
    summary = read_summary(log.read_text() if log.exists() else "")
    return Run(summary, status, time.monotonic() - began)


def report(tool: str, what: str, run: Run) -> bool:
    """Prints one line for a run, and its first finding; whether it is clean."""
    summary, status = run.summary, run.status
    unit = "hazards" if tool == "racecheck" else "errors"
    is_clean = summary.found == 0 and status == 0
    verdict = f"{summary.found} {unit}" if summary.found is not None else "did not finish"
    if summary.found == 0 and status:
        verdict += f", but the run failed with status {status}"
    print(f"{'ok  ' if is_clean else 'FAIL'} {tool:<10} {what:<18} {verdict}, {run.seconds:.0f} s")
    for line in summary.lines:
        print(f"       {line}")
    if not is_clean:
        print(f"       see {LOGS.relative_to(ROOT)}/{tool}-{what.replace(' ', '-')}.log and .out")
    sys.stdout.flush()
    return is_clean


def check_the_tool(sanitizer: str, probe: Path) -> bool:
    """memcheck must see a write out of bounds by one of our kernels."""
    run = sanitize(sanitizer, "memcheck", "planted overrun", [str(probe), "overrun"])
    is_seen = bool(run.summary.found) and "Invalid" in " ".join(run.summary.lines)
    verdict = "seen" if is_seen else "NOT seen: the tool or the filter of kernels does not work"
    print(f"{'ok  ' if is_seen else 'FAIL'} {'memcheck':<10} {'planted overrun':<18} {verdict}, "
          f"{run.seconds:.0f} s", flush=True)  # fmt: skip
    return is_seen


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--probe", type=Path, help="the built attention_probe")
    parser.add_argument("--tools", default="memcheck,racecheck", help="comma-separated")
    parser.add_argument("--all", action="store_true", help="all operator tests, which takes long")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="at a time")
    parser.add_argument("--list", action="store_true", help="print the chosen tests and stop")
    options = parser.parse_args(argv)
    options.tools = options.tools.split(",")
    for tool in options.tools:
        if tool not in TOOLS:
            parser.error(f"--tools must be some of {','.join(TOOLS)}, got {tool!r}")
    if options.probe is not None and not options.probe.is_file():
        parser.error(f"--probe {options.probe} does not exist: build it with cmake")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.list:
        print("\n".join(choose(collect())))
        return 0
    sanitizer = find_sanitizer()
    problem = why_not(sanitizer)
    if problem is not None or sanitizer is None:
        print(f"sanitize: {problem}", file=sys.stderr)
        return 2
    LOGS.mkdir(parents=True, exist_ok=True)
    tests = collect()
    tests = [test for test in tests if "[cuda" in test] if options.all else choose(tests)
    runs = {op: [*PYTEST, *chosen] for op, chosen in by_operator(tests).items()}
    is_clean = True
    if options.probe is None:
        print("without --probe: no attention probe, and the tool itself is not tried")
    else:
        probe = options.probe.resolve()
        runs["attention probe"] = [str(probe), "check"]
        is_clean = check_the_tool(sanitizer, probe)
    with ThreadPoolExecutor(options.jobs) as pool:
        started = [
            (tool, what, pool.submit(sanitize, sanitizer, tool, what, command))
            for tool in options.tools
            for what, command in runs.items()
        ]
        for tool, what, run in started:
            is_clean &= report(tool, what, run.result())
    return 0 if is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
