"""Load on a service or a server: who asks, when, and what became of every request.

    closed loop   N clients, each of which asks again as soon as it has its answer
    open loop     arrivals as a Poisson process, whether or not earlier requests are answered

What is measured is a window in the middle of the load: it opens when the warm-up is over, while all
clients go on, and after it has closed what still runs is waited for. The tokens of a request are
spread evenly over the time it was being answered, and those inside the window count, so that
neither its edges nor its length in requests favour long or short answers.
"""

from __future__ import annotations

import http.client
import itertools
import json
import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from elastic_cache.events import Event, Finished, Progress
from elastic_cache.service import Service

Prompt = str | list[int]
PAUSE_AFTER_ERROR = 0.1  # seconds: a server that is down is not asked a thousand times a second


@dataclass
class Record:
    """What became of a request; times are of `time.perf_counter`, durations in seconds.

    Attributes:
        prompt: what was asked.
        submitted, ended: when.
        error: why there is no complete answer, else None.
        text: all pieces of the stream, joined.
        tokens: generated before the first EOS.
        queue, first_token: from the submission on; None without an answer.
        step_p50, step_p99: of the steps it took part in.
    """

    prompt: Prompt
    submitted: float
    ended: float = 0.0
    error: str | None = None
    text: str = ""
    tokens: int = 0
    queue: float | None = None
    first_token: float | None = None
    step_p50: float | None = None
    step_p99: float | None = None

    @property
    def total(self) -> float:
        return self.ended - self.submitted

    def share_within(self, begin: float, end: float) -> float:
        """How much of the time it was being answered lies between the two."""
        started = self.submitted + (self.queue or 0.0)
        inside = min(self.ended, end) - max(started, begin)
        return max(inside, 0.0) / max(self.ended - started, 1e-9)


@dataclass(frozen=True)
class Work:
    """Steps of the batch since it began, and rows that its requests computed in them."""

    steps: int
    rows: int


class Target(Protocol):
    """What is asked."""

    def ask(self, prompt: Prompt) -> Record:
        """Waits for the answer; whatever goes wrong is the record's error."""

    def work(self) -> Work | None:
        """What was done so far; None where that is not known."""


class ServiceTarget:
    """A service in this process.

    Args:
        service: answers.
        settings: of every request, `max_steps` among them where answers are to end there.
    """

    def __init__(self, service: Service, settings: dict[str, Any]) -> None:
        self._service = service
        self._settings = settings
        self._num_rows = 0  # written by the service's thread alone

    def ask(self, prompt: Prompt) -> Record:
        record, pieces = Record(prompt, time.perf_counter()), list[str]()

        def listen(event: Event) -> None:
            if isinstance(event, Progress):
                self._num_rows += event.step.num_rows
            if isinstance(event, (Progress, Finished)):
                pieces.append(event.delta)

        try:
            ticket = self._service.submit(prompt, **self._settings)
            ticket.listen(listen)
            finished = ticket.result()
        except Exception as error:
            record.error = f"{type(error).__name__}: {error}"
        else:
            timing, generation = finished.timing, finished.generation
            record.tokens = generation.num_tokens
            record.queue, record.first_token = timing.queue, timing.first_token
            record.step_p50, record.step_p99 = timing.step_p50, timing.step_p99
            if not (finished.is_complete or generation.finish_reason == "steps"):
                record.error = f"it ended by {generation.finish_reason}"
        record.ended = time.perf_counter()
        record.text = "".join(pieces)
        return record

    def work(self) -> Work:
        return Work(self._service.stats().num_steps, self._num_rows)


class HttpTarget:
    """A running server, asked for streams at /v1/chat/completions.

    Args:
        url: where it listens.
        settings: fields of every request.
        api_key: sent if given.
        timeout: seconds without a byte after which a request is given up.
    """

    def __init__(
        self, url: str, settings: dict[str, Any], api_key: str | None, timeout: float
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            raise ValueError(f"url must be like http://127.0.0.1:8000, got {url!r}")
        self._address = (parts.hostname, parts.port or 80)
        self._fields = {
            **{name: value for name, value in settings.items() if value is not None},
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout = timeout

    def ask(self, prompt: Prompt) -> Record:
        record = Record(prompt, time.perf_counter())
        body = json.dumps({**self._fields, "messages": [{"role": "user", "content": prompt}]})
        connection = http.client.HTTPConnection(*self._address, timeout=self._timeout)
        try:
            connection.request("POST", "/v1/chat/completions", body, self._headers)
            response = connection.getresponse()
            if response.status != 200:
                record.error = f"status {response.status}: {response.read(300).decode()}"
            else:
                self._follow(response, record)
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            record.error = f"{type(error).__name__}: {error}"
        finally:
            connection.close()
        record.ended = time.perf_counter()
        return record

    def work(self) -> None:
        return None

    def get(self, path: str) -> tuple[float, Any]:
        """Seconds that a GET took, and its JSON; OSError if there was none."""
        begin = time.perf_counter()
        connection = http.client.HTTPConnection(*self._address, timeout=self._timeout)
        try:
            connection.request("GET", path, headers=self._headers)
            response = connection.getresponse()
            body = response.read()
            if response.status != 200:
                raise OSError(f"{path} answers {response.status}")
            return time.perf_counter() - begin, json.loads(body)
        except (http.client.HTTPException, ValueError) as error:
            raise OSError(f"{path}: {error}") from error
        finally:
            connection.close()

    def _follow(self, response: http.client.HTTPResponse, record: Record) -> None:
        """Reads a stream of server-sent events to its end."""
        pieces, is_ended = list[str](), False
        for line in response:
            if not line.startswith(b"data: "):
                continue
            data = line[len(b"data: ") :].strip()
            if data == b"[DONE]":
                is_ended = True
                break
            self._take(json.loads(data), record, pieces)
        record.text = "".join(pieces)
        if not is_ended and record.error is None:
            record.error = "the stream broke off"

    def _take(self, chunk: dict[str, Any], record: Record, pieces: list[str]) -> None:
        if "error" in chunk:
            record.error = str(chunk["error"]["message"])
            return
        for choice in chunk["choices"]:
            pieces.append(choice["delta"].get("content") or "")
        if chunk.get("usage"):
            record.tokens = chunk["usage"]["completion_tokens"]
        facts = chunk.get("elastic_cache", {})
        if "finish_reason" in facts:
            record.queue, record.first_token = facts["queue_seconds"], facts["first_token_seconds"]
            record.step_p50 = facts["step_p50_ms"] / 1000
            record.step_p99 = facts["step_p99_ms"] / 1000
            if not (facts["complete"] or facts["finish_reason"] == "steps"):
                record.error = f"it ended by {facts['finish_reason']}"


@dataclass(frozen=True)
class Limit:
    """How much is measured; one of the two is given.

    Attributes:
        seconds: length of the window.
        requests: so many answers close the window (closed loop), or so many arrive in it (open).
    """

    seconds: float | None = None
    requests: int | None = None


@dataclass(frozen=True)
class Run:
    """A window of load.

    Attributes:
        begin, end: of the window.
        records: every request, also those before and after it.
        counted: those whose latencies count: ended in the window (closed loop), or arrived in it.
        work: what was done in the window, if that is known.
    """

    begin: float
    end: float
    records: list[Record]
    counted: list[Record]
    work: Work | None


@dataclass
class _Book:
    """Records as they come in from many threads."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    records: list[Record] = field(default_factory=list)

    def add(self, record: Record) -> None:
        with self.changed:
            self.records.append(record)
            self.changed.notify_all()

    def wait(self, holds: Callable[[list[Record]], bool], seconds: float | None = None) -> None:
        """Until it holds of the records, or the time is over."""
        with self.changed:
            self.changed.wait_for(lambda: holds(self.records), seconds)


def closed_loop(
    target: Target, prompts: Sequence[Prompt], num_clients: int, warm_up: int, limit: Limit
) -> Run:
    """Clients that ask again as soon as they have their answer.

    Args:
        warm_up: answers of all clients together before the window opens, `num_clients` at least
            for all lanes to be in use.
    """
    book, is_over, turns = _Book(), threading.Event(), itertools.count()

    def converse() -> None:
        while not is_over.is_set():
            record = target.ask(prompts[next(turns) % len(prompts)])
            book.add(record)
            if record.error is not None:
                is_over.wait(PAUSE_AFTER_ERROR)

    clients = [threading.Thread(target=converse, daemon=True) for _ in range(num_clients)]
    for client in clients:
        client.start()
    book.wait(lambda records: len(records) >= warm_up)
    begin, before = time.perf_counter(), target.work()
    if limit.requests is None:
        time.sleep(limit.seconds or 0.0)
    else:
        enough = limit.requests
        book.wait(lambda records: sum(r.ended >= begin for r in records) >= enough)
    end, after = time.perf_counter(), target.work()
    is_over.set()
    for client in clients:
        client.join()
    counted = [record for record in book.records if begin <= record.ended <= end]
    return Run(begin, end, book.records, counted, _difference(before, after))


def open_loop(
    target: Target, prompts: Sequence[Prompt], rate: float, warm_up: int, limit: Limit, seed: int
) -> Run:
    """Arrivals `rate` times a second on average, at random; `warm_up` of them before the window."""
    book, chance, threads = _Book(), random.Random(seed), list[threading.Thread]()
    begin, before, due = math.inf, None, time.perf_counter()
    for number in itertools.count():
        due += chance.expovariate(rate)
        if number >= warm_up:
            if math.isinf(begin):
                begin, before = due, target.work()
            if limit.seconds is not None and due >= begin + limit.seconds:
                break
            if limit.requests is not None and number - warm_up >= limit.requests:
                break
        time.sleep(max(due - time.perf_counter(), 0.0))
        prompt = prompts[number % len(prompts)]
        threads.append(threading.Thread(target=lambda p=prompt: book.add(target.ask(p))))
        threads[-1].start()
    if limit.seconds is not None:
        time.sleep(max(begin + limit.seconds - time.perf_counter(), 0.0))
    end, after = time.perf_counter(), target.work()
    for thread in threads:
        thread.join()
    counted = [record for record in book.records if begin <= record.submitted <= end]
    return Run(begin, end, book.records, counted, _difference(before, after))


def _difference(before: Work | None, after: Work | None) -> Work | None:
    if before is None or after is None:
        return None
    return Work(after.steps - before.steps, after.rows - before.rows)


def quantile(values: Sequence[float], share: float) -> float | None:
    """The least of the values that so large a share does not exceed; None if there is none."""
    ascending = sorted(values)
    return ascending[max(math.ceil(share * len(ascending)), 1) - 1] if ascending else None


def memory(process: str = "self") -> dict[str, int]:
    """Bytes of a process that are in memory now, and were at its peak; Linux only."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    sizes = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    return {"now": int(sizes["VmRSS"][0]) * 1024, "peak": int(sizes["VmHWM"][0]) * 1024}
