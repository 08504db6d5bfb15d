"""Many clients for a long time: every answer must be the one given alone, and memory stay flat.

An answer is wrong if it is no answer of the model to that question, and mixed if it is the one to
another question. Requests are lost if at the end, when none begins any more, `GRACE` seconds pass
in which none ends. Memory counts as flat if, from a quarter of the time on, what the process has in
memory grows by no more than `GROWTH` and `SLACK` bytes together.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from serving_load import PAUSE_AFTER_ERROR, Record, Target, quantile

GRACE = 120.0
GROWTH, SLACK = 0.1, 32 * 2**20
SAMPLE_SECONDS = 1.0


@dataclass
class Verdict:
    """What a soak has found.

    Attributes:
        requests, right: how many were answered in all, and as alone.
        errors, wrong, mixed, lost: the others, and those never answered.
        examples: sentences on the first of them.
        seconds: how long it took.
        memory: seconds since the start, bytes.
        health_p50, health_p99: seconds that the server's /health took.
        health_failures: how often it did not answer.
    """

    requests: int = 0
    right: int = 0
    errors: int = 0
    wrong: int = 0
    mixed: int = 0
    lost: int = 0
    examples: list[str] = field(default_factory=list)
    seconds: float = 0.0
    memory: list[tuple[float, int]] = field(default_factory=list)
    health_p50: float | None = None
    health_p99: float | None = None
    health_failures: int = 0

    def judge(self, record: Record, answers: dict[str, str]) -> None:
        """Counts an answer; `answers` are those given alone, by question."""
        self.requests += 1
        question = str(record.prompt)
        if record.error is not None:
            self.errors += 1
            self._note(f"{question!r}: {record.error}")
        elif record.text == answers[question]:
            self.right += 1
        else:
            others = [other for other, answer in answers.items() if answer == record.text]
            self.mixed += bool(others)
            self.wrong += not others
            whose = f"the answer to {others[0]!r}" if others else repr(record.text)
            self._note(f"{question!r}: not {answers[question]!r} but {whose}")

    @property
    def growth(self) -> int | None:
        """Bytes that were added since a quarter of the time; None where memory is not known."""
        late = [size for _, size in self.memory[len(self.memory) // 4 :]]
        part = max(len(late) // 4, 1)
        if not late:
            return None
        return int(statistics.median(late[-part:]) - statistics.median(late[:part]))

    @property
    def is_flat(self) -> bool:
        before = self.memory[len(self.memory) // 4][1] if self.memory else 0
        return (self.growth or 0) <= GROWTH * before + SLACK

    @property
    def is_good(self) -> bool:
        faults = self.errors + self.wrong + self.mixed + self.lost + self.health_failures
        return self.right > 0 and faults == 0 and self.is_flat

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "growth_bytes": self.growth, "is_good": self.is_good}

    def __str__(self) -> str:
        counts = ("right", "errors", "wrong", "mixed", "lost")
        lines = [
            f"{self.requests} requests in {self.seconds:.0f} s: "
            + ", ".join(f"{getattr(self, name)} {name}" for name in counts)
        ]
        if self.memory:
            sizes = [size / 2**20 for _, size in self.memory]
            lines.append(
                f"memory {sizes[0]:.0f} MiB at the start, {sizes[-1]:.0f} at the end, "
                f"{max(sizes):.0f} at most; {(self.growth or 0) / 2**20:+.1f} since a quarter of "
                f"the time: {'flat' if self.is_flat else 'NOT FLAT'}"
            )
        if self.health_p50 is not None and self.health_p99 is not None:
            lines.append(
                f"/health took {1e3 * self.health_p50:.1f} ms (p50) and "
                f"{1e3 * self.health_p99:.1f} ms (p99), and failed {self.health_failures} times"
            )
        return "\n".join([*lines, *self.examples])

    def _note(self, example: str) -> None:
        if len(self.examples) < 10:
            self.examples.append(example)


def soak(
    target: Target,
    answers: dict[str, str],
    num_clients: int,
    seconds: float,
    read_memory: Callable[[], int] | None,
    read_health: Callable[[], float] | None,
) -> Verdict:
    """Clients that ask one question after another, each beginning with another one.

    Args:
        answers: by question, as given alone.
        read_memory: bytes in memory now of the process that answers; None where unknown.
        read_health: seconds that a look at the server's health took; OSError if it failed.
    """
    verdict, lock, is_over = Verdict(), threading.Lock(), threading.Event()
    questions, begin = list(answers), time.perf_counter()

    def converse(number: int) -> None:
        while not is_over.is_set():
            record = target.ask(questions[number % len(questions)])
            number += 1
            with lock:
                verdict.judge(record, answers)
            if record.error is not None:
                is_over.wait(PAUSE_AFTER_ERROR)

    clients = [
        threading.Thread(target=converse, args=(number,), daemon=True)
        for number in range(num_clients)
    ]
    for client in clients:
        client.start()
    _sample(verdict, begin, seconds, read_memory, read_health)
    is_over.set()
    num_lost = _wait_for(clients)
    with lock:
        verdict.lost = num_lost
        verdict.seconds = time.perf_counter() - begin
    return verdict


def _wait_for(clients: list[threading.Thread]) -> int:
    """How many do not end, though `GRACE` seconds have passed since the last that did."""
    deadline = time.perf_counter() + GRACE
    while clients and time.perf_counter() < deadline:
        clients[0].join(0.05)
        left = [client for client in clients if client.is_alive()]
        if len(left) < len(clients):
            deadline = time.perf_counter() + GRACE
        clients = left
    return len(clients)


def _sample(
    verdict: Verdict,
    begin: float,
    seconds: float,
    read_memory: Callable[[], int] | None,
    read_health: Callable[[], float] | None,
) -> None:
    """Looks at memory and health until the time is over."""
    took: list[float] = []
    while (now := time.perf_counter() - begin) < seconds:
        if read_memory is not None:
            verdict.memory.append((now, read_memory()))
        if read_health is not None:
            try:
                took.append(read_health())
            except OSError:
                verdict.health_failures += 1
        time.sleep(min(SAMPLE_SECONDS, max(begin + seconds - time.perf_counter(), 0.0)))
    verdict.health_p50, verdict.health_p99 = quantile(took, 0.5), quantile(took, 0.99)
