"""`elastic-cache doctor`: what this installation is made of, what is wrong, and the fix.

Every check stands alone and imports what it needs, so that the rest is still reported when torch
or the native operators are missing. A problem is required (nothing runs: exit code 1) or not.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from elastic_cache.cli import options as shared
from elastic_cache.cli.table import format_fields

_OLDEST_TORCH, _OLDEST_PYTHON = (2, 11), (3, 10)
_BUILD = "run `pip install --no-build-isolation -e .` in the checkout"
_KEYS = ("CPU", "CUDA", "Meta")
_QUESTION = "Ava has 5 apples. Then Ava buys 3 more apples. How many apples does Ava have now?"


@dataclass(frozen=True)
class Check:
    """One fact about the installation, and what is wrong with it."""

    name: str
    value: str
    problem: str | None = None
    fix: str | None = None
    is_required: bool = False


def add_command(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        help="say what is wrong with this installation",
        description="Says what this installation is made of, what is wrong, and the fix.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    checks = list(examine())
    is_ok = not any(check.problem and check.is_required for check in checks)
    if options.json:
        print(shared.write_json({"ok": is_ok, "checks": [asdict(check) for check in checks]}))
    else:
        print(_format(checks, is_ok))
    return 0 if is_ok else 1


def examine() -> Iterator[Check]:
    """All checks, in the order in which one thing needs another."""
    for check in _CHECKS:
        try:
            yield from check()
        except Exception as error:  # a check that fails must not hide the others
            name = check.__name__.strip("_").replace("_", " ")
            reason = " ".join(str(error).split()) or type(error).__name__
            yield Check(name, "unknown", f"could not be examined: {reason}", "see the line above")


def _python() -> Iterator[Check]:
    is_old = sys.version_info[:2] < _OLDEST_PYTHON
    yield Check(
        "python",
        f"{platform.python_version()} ({sys.executable})",
        "Python is older than 3.10" if is_old else None,
        "install Python 3.10 or newer and make a new environment with it" if is_old else None,
        is_required=True,
    )


def _torch() -> Iterator[Check]:
    try:
        import torch
    except ImportError as error:
        problem = f"torch cannot be imported: {error}"
        yield Check("torch", "missing", problem, "run `pip install torch==2.13.0`", True)
        return
    version = torch.__version__
    is_old = tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_TORCH
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    yield Check(
        "torch",
        f"{version} ({build})",
        "torch is older than 2.11" if is_old else None,
        "run `pip install torch==2.13.0`, then build the operators again" if is_old else None,
        is_required=True,
    )
    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    is_many = threads > cores
    yield Check(
        "threads",
        f"{threads} on {cores} available cores, {torch.backends.cpu.get_cpu_capability()}",
        "torch uses more threads than there are cores" if is_many else None,
        f"set OMP_NUM_THREADS={cores}" if is_many else None,
    )


def _cuda() -> Iterator[Check]:
    import torch

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            seen = torch.cuda.get_device_properties(i)
            size = f"{seen.total_memory / 1e9:.0f} GB"
            yield Check(f"GPU {i}", f"{seen.name}, capability {seen.major}.{seen.minor}, {size}")
        yield Check("NVIDIA driver", _driver() or "unknown")
        return
    has_driver = Path("/proc/driver/nvidia/version").exists()
    needs_build = has_driver and torch.version.cuda is None
    yield Check(
        "GPU",
        "none visible to torch",
        "there is an NVIDIA driver, but this torch was built without CUDA" if needs_build else None,
        "install a CUDA build of torch, then build the operators again" if needs_build else None,
    )


def _driver() -> str | None:
    """The driver's version: as the kernel tells it, or, in a container, as nvidia-smi does."""
    file = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d[\d.]*", file.read_text()) if file.exists() else None
    if found:
        return found[0]
    smi = shutil.which("nvidia-smi")
    lines = _output(smi, "--query-gpu=driver_version", "--format=csv,noheader") if smi else []
    return lines[0] if lines else None


def _cuda_kernels() -> Iterator[Check]:
    try:
        from elastic_cache import device
    except ImportError:  # no operators at all, which _operators has said
        return
    cuda = device.survey(range(_count_gpus()))
    archs = device.format_archs(cuda.archs)
    yield Check("CUDA kernels", f"built for capability {archs}" if archs else "not built")
    yield from judge_gpus(cuda)


def judge_gpus(cuda: Any) -> Iterator[Check]:
    """For each GPU of a `device.Cuda`, whether the kernels can use it, and all of them."""
    from elastic_cache import device

    for i in range(len(cuda.gpus)):
        name, problem = f"kernels on GPU {i}", device.why_unusable(cuda, i)
        if problem is not None:
            yield Check(name, "cannot run", problem.reason, problem.fix)
        else:
            yield Check(name, "run")


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _compiler() -> Iterator[Check]:
    path = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    yield Check(
        "compiler",
        _first_line(path, "--version") if path else "none",
        None if path else "there is no C++ compiler to build the operators with",
        None if path else "run `apt-get install g++` (or your system's equivalent)",
    )
    nvcc = shutil.which("nvcc")
    yield Check("nvcc", _release(nvcc) if nvcc else "none")


def _operators() -> Iterator[Check]:
    try:
        import elastic_cache.ops  # noqa: F401  loads the shared object
    except ImportError as error:
        reason = " ".join(str(error).split())
        yield Check("operators", "not loaded", reason, _BUILD, True)
        return
    import torch

    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    names = sorted(
        name for name in torch._C._dispatch_get_all_op_names() if name.startswith("elastic_cache::")
    )
    if not names:
        yield Check("operators", "none", "the shared object registers no operator", _BUILD, True)
    for name in names:
        built = [key for key in _KEYS if has_kernel(name, key)]
        missing = [key for key in ("CPU", "Meta") if key not in built]
        yield Check(
            f"op {name.removeprefix('elastic_cache::')}",
            " ".join(built) or "no kernel",
            f"no kernel for {' and '.join(missing)}" if missing else None,
            _BUILD if missing else None,
            is_required=True,
        )


def _openmp() -> Iterator[Check]:
    """Two OpenMP runtimes in one process are two pools of threads that fight for the cores."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return
    files = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines()}
    runtimes = sorted(
        file
        for file in files
        if Path(file).name.startswith(("libgomp", "libiomp", "libomp.", "libomp-"))
    )
    is_many = len(runtimes) > 1
    yield Check(
        "OpenMP runtimes",
        ", ".join(runtimes) or "none",
        f"{len(runtimes)} OpenMP runtimes are loaded and compete for the cores"
        if is_many
        else None,
        "build the operators again with the torch of this environment" if is_many else None,
    )


def _embedded_model() -> Iterator[Check]:
    try:
        from elastic_cache.engine import load

        result = load("tiny").generate(_QUESTION, gen_length=128)
    except Exception as error:  # whatever it is, it is the finding
        reason = " ".join(str(error).split()) or type(error).__name__
        fix = "fix the problems above first; if there are none, install the package again"
        yield Check("embedded model", "does not answer", reason, fix, True)
        return
    is_empty = not result.num_tokens
    yield Check(
        "embedded model",
        f"answers: {result.num_tokens} tokens, {result.tokens_per_second:.0f} tokens/s",
        "the answer is empty" if is_empty else None,
        "install the package again" if is_empty else None,
        is_required=True,
    )


_CHECKS: tuple[Callable[[], Iterator[Check]], ...] = (
    _python,
    _torch,
    _cuda,
    _compiler,
    _operators,
    _cuda_kernels,
    _openmp,
    _embedded_model,
)


def _first_line(*command: str) -> str:
    lines = _output(*command)
    return f"{lines[0]} ({command[0]})" if lines else f"{command[0]} does not run"


def _release(nvcc: str) -> str:
    release = [line for line in _output(nvcc, "--version") if "release" in line]
    return f"{release[0]} ({nvcc})" if release else f"{nvcc} does not run"


def _output(*command: str) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return done.stdout.strip().splitlines()


def _format(checks: list[Check], is_ok: bool) -> str:
    lines = [format_fields([(check.name, check.value) for check in checks])]
    for check in checks:
        if check.problem:
            kind = "problem" if check.is_required else "warning"
            lines.append(f"{kind}: {check.name}: {check.problem}; fix: {check.fix}")
    lines.append("everything required works" if is_ok else "something required is broken")
    return "\n".join(lines)
