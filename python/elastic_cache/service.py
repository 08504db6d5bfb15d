"""Many requests at once: a queue, and one thread that steps the batch.

Whoever asks never touches the engine: requests go in through a queue, and events come out to
listeners, which the thread calls. Only that thread adds to, steps and removes from the batch, so
nothing is shared. Between two steps it looks at cancellations, deadlines and the queue.
"""

from __future__ import annotations

import atexit
import dataclasses
import logging
import math
import threading
import time
from bisect import insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch

from elastic_cache.answer_text import AnswerText
from elastic_cache.batch import Batch, Outcome
from elastic_cache.config import MAX_FULL_ROWS, GenerationConfig, find_settings
from elastic_cache.engine import Engine
from elastic_cache.events import Event as Event
from elastic_cache.events import Failed, Finished, Progress, Started, Timing
from elastic_cache.native import release_workers
from elastic_cache.policies import Policy, make_policy
from elastic_cache.prompt import Prompt, encode_prompt
from elastic_cache.request import Request
from elastic_cache.ticket import Ticket
from elastic_cache.types import Generation, Message


class QueueFullError(Exception):
    """Nothing can be accepted now; another time it can."""


class ServiceClosedError(Exception):
    """The service accepts nothing any more."""


@dataclass(frozen=True)
class Stats:
    """The service now, and since its start.

    Attributes:
        num_queued, num_running: requests waiting, and in the batch.
        num_finished, num_failed, num_cancelled, num_incomplete: requests that ended so; a deadline
            or step budget makes an answer incomplete.
        num_rejected: refused because the queue was full.
        num_tokens: tokens of finished answers.
        num_steps: steps of the batch.
        busy_seconds: time spent in them.
    """

    num_queued: int
    num_running: int
    num_finished: int
    num_failed: int
    num_cancelled: int
    num_incomplete: int
    num_rejected: int
    num_tokens: int
    num_steps: int
    busy_seconds: float


@dataclass(eq=False)
class _Job:
    """A request on its way through the service; times are of `time.monotonic`."""

    ticket: Ticket
    config: GenerationConfig
    encoded: Prompt
    policy: Policy
    text: AnswerText
    order: tuple[int, int]  # lowest first
    submitted: float
    expires: float
    max_steps: float
    request: Request | None = None  # from when it runs on
    started: float | None = None
    first_token: float | None = None
    step_seconds: list[float] = dataclasses.field(default_factory=list)

    def stop_reason(self, now: float) -> str | None:
        """Why it ends before the next step, if it does."""
        if self.ticket.is_cancelled:
            return "cancelled"
        if now >= self.expires:
            return "deadline"
        return "steps" if len(self.step_seconds) >= self.max_steps else None

    def timing(self, now: float) -> Timing:
        started = now if self.started is None else self.started
        first = None if self.first_token is None else self.first_token - self.submitted
        seconds = sorted(self.step_seconds)
        return Timing(
            queue=started - self.submitted,
            first_token=first,
            total=now - self.submitted,
            step_p50=_quantile(seconds, 0.5),
            step_p99=_quantile(seconds, 0.99),
        )


class Service:
    """Answers requests with one model until it is closed; as a context, until that is left.

    Args:
        engine: the loaded model; nobody else may use it meanwhile.
        num_lanes: requests answered together, at most.
        max_queue: requests waiting, at most; those that a free lane awaits do not count.
        max_length, max_full_rows: as of `Engine.batch`.

    Attributes:
        max_length: tokens of a request, prompt and gen_length together, at most.

    Raises:
        ValueError: a wrong argument, or the GPU has no room for so many lanes.
    """

    def __init__(
        self,
        engine: Engine,
        num_lanes: int = 8,
        max_queue: int = 64,
        max_length: int | None = None,
        max_full_rows: int = MAX_FULL_ROWS,
    ) -> None:
        if max_queue < 0:
            raise ValueError(f"max_queue must be at least 0, got {max_queue}")
        self._engine = engine
        self._num_lanes = num_lanes
        self._max_queue = max_queue
        self._make_batch = partial(engine.batch, num_lanes, max_length, max_full_rows)
        batch = self._make_batch()
        self.max_length = batch.max_length
        self._batch: Batch | None = batch  # None: the last one broke
        # Guards what follows. Jobs are moved and counted by the thread alone, new ones excepted.
        self._changed = threading.Condition()
        self._queue: list[_Job] = []  # next one first
        self._running: dict[Request, _Job] = {}
        self._listened: list[Ticket] = []  # whose listeners are due the events so far
        self._counts: Counter[str] = Counter()
        self._busy_seconds = 0.0
        self._num_submitted = 0
        self._close_at: float | None = None  # closed; what runs has until then
        self._has_ended = False
        release_workers()  # of who loaded the model: from now on another thread computes
        # A daemon: the interpreter waits for others before it calls what would end them.
        self._thread = threading.Thread(target=self._run, name="elastic_cache.service", daemon=True)
        self._thread.start()
        atexit.register(self._exit)

    def __enter__(self) -> Service:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def submit(
        self,
        prompt: str | Sequence[Message] | Sequence[int] | torch.Tensor,
        *,
        priority: int = 0,
        deadline: float | None = None,
        max_steps: int | None = None,
        **settings: Any,
    ) -> Ticket:
        """Queues a request.

        Args:
            prompt, settings: as of `Engine.generate`; checked here, before queueing.
            priority: of those waiting the highest goes first, equals in order of arrival.
            deadline: seconds from now until which there must be an answer: then it ends as it
                stands, also if it is still queued (an empty answer).
            max_steps: denoising steps after which it ends as it stands.

        Raises:
            ValueError: a sentence naming the argument and the rule it breaks.
            QueueFullError: so many are waiting.
            ServiceClosedError: it has been closed.
        """
        _check_limits(priority, deadline, max_steps)
        config = find_settings(settings)
        model, now = self._engine.model, time.monotonic()
        encoded = encode_prompt(model, prompt, config.gen_length)
        policy = make_policy(encoded.masked.tolist(), config, model.config.eos_id)
        batch = self._batch
        if batch is not None:  # else whoever makes the next one will tell
            batch.check(encoded, config, policy)
        text = AnswerText(model, encoded)
        with self._changed:
            if self._close_at is not None:
                raise ServiceClosedError("the service is closed and accepts no requests")
            # Free lanes count: the thread will fill them as soon as it gets to it.
            num_waiting = len(self._queue) + len(self._running) - self._num_lanes
            if num_waiting >= self._max_queue:
                self._counts["num_rejected"] += 1
                raise QueueFullError(
                    f"{self._max_queue} requests are waiting, and no more may: try again later"
                )
            self._num_submitted += 1
            job = _Job(
                ticket=Ticket(self._on_listen),
                config=config,
                encoded=encoded,
                policy=policy,
                text=text,
                order=(-priority, self._num_submitted),
                submitted=now,
                expires=math.inf if deadline is None else now + deadline,
                max_steps=math.inf if max_steps is None else max_steps,
            )
            insort(self._queue, job, key=lambda other: other.order)
            self._changed.notify()
        return job.ticket

    def stats(self) -> Stats:
        """Numbers of one moment."""
        with self._changed:
            return Stats(
                num_queued=len(self._queue),
                num_running=len(self._running),
                num_finished=self._counts["num_finished"],
                num_failed=self._counts["num_failed"],
                num_cancelled=self._counts["num_cancelled"],
                num_incomplete=self._counts["num_incomplete"],
                num_rejected=self._counts["num_rejected"],
                num_tokens=self._counts["num_tokens"],
                num_steps=self._counts["num_steps"],
                busy_seconds=self._busy_seconds,
            )

    def close(self, seconds: float = 30.0) -> None:
        """Accepts nothing more, fails what is queued (ServiceClosedError), gives what runs so many
        seconds to finish, ends the rest as it stands ("cancelled"), and joins the thread."""
        self._stop_accepting(seconds)
        self._thread.join()
        atexit.unregister(self._exit)

    def _exit(self) -> None:
        """For a program that ends without `close`: a thread that is killed inside of torch takes
        the process down with it. Does not wait for a step that hangs."""
        self._stop_accepting(0.0)
        self._thread.join(timeout=10.0)

    def _stop_accepting(self, seconds: float) -> None:
        with self._changed:
            at = time.monotonic() + seconds
            self._close_at = at if self._close_at is None else min(at, self._close_at)
            self._changed.notify()

    def _on_listen(self, ticket: Ticket) -> None:
        with self._changed:
            if not self._has_ended:
                self._listened.append(ticket)
                self._changed.notify()
                return
        ticket.call_listener()

    def _run(self) -> None:
        """The thread."""
        while self._wait():
            try:
                self._end_waiting()
                self._end_running()
                self._fill_lanes()
                if self._running:
                    self._step()
            except Exception as error:
                self._fail(error)
        self._batch = None  # its memory, whoever still holds the service

    def _wait(self) -> bool:
        """Waits for something to do; False when nothing can come any more."""
        with self._changed:
            while not (self._queue or self._running or self._listened):
                if self._close_at is not None:
                    self._has_ended = True
                    return False
                self._changed.wait()
            listened, self._listened = self._listened, []
        for ticket in listened:
            ticket.call_listener()
        return True

    def _end_waiting(self) -> None:
        """Ends what waits and may not any longer."""
        now = time.monotonic()
        with self._changed:
            waiting, is_closed = list(self._queue), self._close_at is not None
        for job in waiting:
            reason = job.stop_reason(now)
            if reason is not None:
                self._finish(job, _unstarted(job, reason), now)
            elif is_closed:
                error = ServiceClosedError("the service was closed while the request waited")
                self._leave(job, Failed(error))

    def _end_running(self) -> None:
        """Stops what was cancelled or has reached a limit; its lanes are free then."""
        now = time.monotonic()
        with self._changed:
            is_over = self._close_at is not None and now >= self._close_at
        for request, job in list(self._running.items()):
            reason = job.stop_reason(now) or ("cancelled" if is_over else None)
            if reason is not None:
                self._lanes().remove(request)
                self._finish(job, request.stop(reason), now)

    def _fill_lanes(self) -> None:
        while True:
            with self._changed:
                if not self._queue:
                    return
                job = self._queue[0]
            try:
                batch = self._lanes()
                if not batch.num_free:
                    return
                request = batch.begin(job.encoded, job.config, job.policy)
            except Exception as error:
                self._leave(job, Failed(error))
                continue
            now = job.started = time.monotonic()
            with self._changed:
                self._queue.remove(job)
                self._running[request] = job
                job.request = request
            num_prompt = len(job.encoded.ids) - job.config.gen_length
            job.ticket.put(Started(now - job.submitted, num_prompt))

    def _lanes(self) -> Batch:
        """The batch; a new one after a failure, of which only the next request need know."""
        if self._batch is None:
            self._batch = self._make_batch()
        return self._batch

    def _step(self) -> None:
        outcomes: list[Outcome] = []
        started = time.monotonic()
        try:
            batch = self._lanes()
            batch.wait()
            self._fill_lanes()  # with who asked while it ran
            outcomes = batch.step()
        finally:
            now = time.monotonic()
            with self._changed:
                self._busy_seconds += now - started
                self._counts["num_steps"] += any(outcome.step for outcome in outcomes)
        for outcome in outcomes:
            self._hand_out(outcome, now, now - started)

    def _hand_out(self, outcome: Outcome, now: float, seconds: float) -> None:
        """Tells a request's owner what a step of so many seconds, which ended `now`, has done."""
        request, step = outcome.request, outcome.step
        job = self._running[request]
        if step is not None:
            job.step_seconds.append(seconds)
            if job.first_token is None and step.committed:
                job.first_token = now
            delta = job.text.add(step)
            job.ticket.put(Progress(delta, job.text.provisional(), step))
        if outcome.error is not None:
            self._leave(job, Failed(outcome.error))
        elif request.is_finished:
            self._finish(job, request.result, now)

    def _finish(self, job: _Job, generation: Generation, now: float) -> None:
        """Ends a job with an answer."""
        delta = job.text.rest(generation.text)
        self._leave(job, Finished(delta, generation, job.timing(now)))

    def _leave(self, job: _Job, event: Finished | Failed) -> None:
        """Takes a job out of the books, and tells its owner why."""
        with self._changed:
            if job.request is None:
                self._queue.remove(job)
            else:
                del self._running[job.request]
            self._counts[_kind(event)] += 1
            if isinstance(event, Finished) and event.is_complete:
                self._counts["num_tokens"] += event.generation.num_tokens
        job.ticket.put(event)

    def _fail(self, error: Exception) -> None:
        """Fails all that runs, for a batch in which a step failed cannot be trusted.

        With nothing running, the error can only come from what waits: then that fails.
        """
        logging.getLogger(__name__).error("all running requests fail", exc_info=error)
        # The frames of a traceback hold the broken batch's memory, which the next one needs.
        error = error.with_traceback(None)
        self._batch = None
        with self._changed:
            jobs = list(self._running.values()) or list(self._queue)
        for job in jobs:
            self._leave(job, Failed(error))


def _unstarted(job: _Job, reason: str) -> Generation:
    """The answer to a request that never ran."""
    return Generation(
        ids=job.encoded.ids,
        text=job.text.whole(),
        num_tokens=0,
        nfe=0,
        update_frequency=0.0,
        seconds=0.0,
        finish_reason=reason,
        settings=dataclasses.asdict(job.config),
    )


def _kind(event: Finished | Failed) -> str:
    """Which number of `Stats` counts it."""
    if isinstance(event, Failed):
        return "num_failed"
    if event.is_complete:
        return "num_finished"
    is_cancelled = event.generation.finish_reason == "cancelled"
    return "num_cancelled" if is_cancelled else "num_incomplete"


def _check_limits(priority: int, deadline: float | None, max_steps: int | None) -> None:
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise ValueError(f"priority must be a whole number, got {priority!r}")
    if deadline is not None:
        is_number = isinstance(deadline, (int, float)) and not isinstance(deadline, bool)
        if not is_number or not deadline >= 0:
            raise ValueError(f"deadline must be a number of seconds, at least 0, got {deadline!r}")
    if max_steps is not None:
        if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
            raise ValueError(f"max_steps must be a whole number, at least 1, got {max_steps!r}")


def _quantile(ascending: list[float], share: float) -> float:
    """The least of the values that so large a share does not exceed; 0 if there is none."""
    return ascending[math.ceil(share * len(ascending)) - 1] if ascending else 0.0
