"""Times an operator against plain torch: what all bench_<op>.py files share.

    python benchmarks/bench_swiglu.py [--device cuda] [--dtype bfloat16]

A case has two arms, the operator and the same work in plain torch, on the same random data. Rounds
of the arms alternate, so that a change of clock or load hits both; the median round counts. A round
repeats its arm for about a millisecond. On a GPU the repeats are one CUDA graph timed by events, so
that the kernels are measured and not their launches; an arm that waits for the host cannot be
captured and is timed by the clock ("host" in the table). Repeats find their data in the
second-level cache where it fits: a rate may then be above what reading memory gives.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

WARM_UP_CALLS = 5
NUM_ROUNDS = 41
ROUND_SECONDS = 1e-3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One size of one operator.

    Attributes:
        label: the size, as printed.
        native: runs the operator once.
        plain: the same work in plain torch.
        num_bytes: bytes that have to be read and written at least.
        num_flops: multiplications and additions, 0 where they are not the point.
        plain_waits: whether the plain arm waits for the host, which a GPU cannot capture.
    """

    label: str
    native: Callable[[], object]
    plain: Callable[[], object]
    num_bytes: int
    num_flops: int = 0
    plain_waits: bool = False


@dataclass(frozen=True)
class Data:
    """Random tensors on one device: never zeros, whose arithmetic is faster on some hardware."""

    device: torch.device
    dtype: torch.dtype
    rng: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(shape, generator=self.rng, dtype=torch.float32)
        return x.to(self.device, dtype or self.dtype)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(shape, generator=self.rng).to(self.device, dtype)

    def coin(self, *shape: int, chance: float) -> Tensor:
        return self.uniform(*shape) < chance

    def slots(self, count: int, num_slots: int) -> Tensor:
        """[count] int32 distinct slots, ascending as in a window."""
        chosen = torch.randperm(num_slots, generator=self.rng)[:count].sort().values
        return chosen.to(self.device, torch.int32)

    def int32(self, values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def rope(self, num_positions: int, head_dim: int) -> Tensor:
        angle = 6.3 * self.uniform(num_positions, head_dim // 2)
        return torch.cat((angle.cos(), angle.sin()), dim=-1)


def num_bytes(*tensors: Tensor) -> int:
    """Bytes of all the tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def run(op: str, make_cases: Callable[[Data], list[Case]]) -> None:
    """Command line of a bench file: print a table of its cases."""
    parser = argparse.ArgumentParser(description=f"time {op} against plain torch")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=tuple(DTYPES))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and torch sees none")
    device = torch.device(options.device)
    peak = stream_rate(device) if device.type == "cuda" else None
    read = "" if peak is None else f", reading alone gives {peak / 1e9:.0f} GB/s"
    print(f"{op}, {options.dtype}, on {machine(device)}, torch {torch.__version__}{read}")
    heads = f"{'us':>10}{'GB/s':>9}{'% peak':>8}{'GFLOP/s':>10}{'plain us':>10}{'x plain':>9}"
    print(f"{'case':<36}{heads}")
    for case in make_cases(Data(device, DTYPES[options.dtype])):
        native, plain = compare(case, device)
        rate = case.num_bytes / native
        share = "-" if peak is None else f"{100 * rate / peak:.0f}"
        work = f"{case.num_flops / native / 1e9:.1f}" if case.num_flops else "-"
        waits = " host" if case.plain_waits and peak is not None else ""
        print(
            f"{case.label:<36}{native * 1e6:>10.1f}{rate / 1e9:>9.1f}{share:>8}{work:>10}"
            f"{plain * 1e6:>10.1f}{plain / native:>9.2f}{waits}"
        )


def compare(case: Case, device: torch.device) -> tuple[float, float]:
    """Median seconds of a call of the native and of the plain arm, rounds alternating."""
    arms = (
        _prepare(case.native, device, is_captured=True),
        _prepare(case.plain, device, is_captured=not case.plain_waits),
    )
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(NUM_ROUNDS):
        for arm, times in zip(arms, seconds, strict=True):
            times.append(arm())
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def _prepare(
    arm: Callable[[], object], device: torch.device, is_captured: bool
) -> Callable[[], float]:
    """A function that runs a round and returns the seconds of a call in it."""
    _seconds(arm, WARM_UP_CALLS, device)
    one = _seconds(arm, WARM_UP_CALLS, device) / WARM_UP_CALLS
    count = max(1, int(ROUND_SECONDS / max(one, 1e-7)))
    if device.type != "cuda" or not is_captured:
        return lambda: _seconds(arm, count, device) / count
    graph, begin, end = torch.cuda.CUDAGraph(), *(_timer(), _timer())
    with torch.cuda.graph(graph):
        for _ in range(count):
            arm()

    def replay() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return 1e-3 * begin.elapsed_time(end) / count

    replay()
    return replay


def _timer() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _seconds(arm: Callable[[], object], count: int, device: torch.device) -> float:
    synchronise(device)
    begin = time.perf_counter()
    for _ in range(count):
        arm()
    synchronise(device)
    return time.perf_counter() - begin


def stream_rate(device: torch.device) -> float:
    """Bytes per second of reading alone: the best of torch's reductions over 4 GiB."""
    data = torch.empty(2**30, dtype=torch.int32, device=device).random_()
    best = 0.0
    for reduce in (torch.amax, torch.sum, lambda x: x.view(torch.float32).amax()):
        _seconds(lambda reduce=reduce: reduce(data), 1, device)
        for _ in range(5):
            seconds = _seconds(lambda reduce=reduce: reduce(data), 1, device)
            best = max(best, data.numel() * 4 / seconds)
    return best


def synchronise(device: torch.device) -> None:
    """Waits for a GPU; on the CPU there is nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device) -> str:
    """The processor that the numbers belong to."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return f"{model}, {torch.get_num_threads()} threads"
