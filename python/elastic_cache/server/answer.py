"""A submitted request becomes a response, whole or as a stream of server-sent events.

The subtle thing: the service calls from its own thread, and the client may leave at any moment.
Both end up in one asyncio queue per request: events, and None once the client has gone; whatever
ends the response cancels the ticket, which is harmless when the answer is finished.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from elastic_cache.errors import ElasticCacheError
from elastic_cache.events import Event, Failed, Finished, Progress, Started
from elastic_cache.models.tokenizer import Tokenizer
from elastic_cache.server.errors import (
    ApiError,
    ErrorBody,
    from_value_error,
    internal_error,
    unavailable,
)
from elastic_cache.server.log import FIELDS, logger
from elastic_cache.server.metrics import Metrics
from elastic_cache.server.record import CLIENT_GONE, Record
from elastic_cache.server.responses import (
    END_OF_STREAM,
    StartInfo,
    Writer,
    finish_reason,
    server_event,
    statistics,
    step_info,
    usage_of,
)
from elastic_cache.service import ServiceClosedError
from elastic_cache.ticket import Ticket


@dataclass(frozen=True)
class Manner:
    """How an answer is given.

    Attributes:
        is_stream: as server-sent events, else at once.
        has_usage: a stream ends with a chunk of usage.
        has_steps: a stream tells of every step.
    """

    is_stream: bool
    has_usage: bool
    has_steps: bool


@dataclass(frozen=True)
class Facts:
    """What chunks say of the request and its model.

    Attributes:
        prompt_tokens, gen_length: in tokens.
        num_layers, eos_id: of the model.
        tokenizer: decodes committed tokens.
    """

    prompt_tokens: int
    gen_length: int
    num_layers: int
    eos_id: int
    tokenizer: Tokenizer


class Answer(Response):
    """Follows a ticket to its end.

    Args:
        ticket: the submitted request; nobody else listens to it.
        writer: the form of the endpoint.
        manner, facts: see there.
        record, metrics: where the end is noted.
    """

    def __init__(
        self,
        ticket: Ticket,
        writer: Writer,
        manner: Manner,
        facts: Facts,
        record: Record,
        metrics: Metrics,
    ) -> None:
        super().__init__()
        self._ticket = ticket
        self._writer = writer
        self._manner = manner
        self._facts = facts
        self._record = record
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._record.outcome = "cancelled"  # unless it gets to an end
        async with self._follow(receive) as events:
            # The status is known once the request has left the queue, not before.
            first = await events.get()
            if self._manner.is_stream and isinstance(first, (Started, Finished)):
                await self._stream(first, events, send)
                return
            last = first
            while isinstance(last, (Started, Progress)):
                last = await events.get()
            await self._whole(last)(scope, receive, send)

    def _whole(self, last: Finished | Failed | None) -> Response:
        """The response to what ended the request; None is a client that has gone."""
        if last is None:
            return Response(status_code=CLIENT_GONE)
        if isinstance(last, Failed):
            return self._error(last.error).response()
        self._note(last)
        usage, info = usage_of(last, self._facts.prompt_tokens), statistics(last)
        text = last.generation.text or ""
        return JSONResponse(self._writer.answer(text, finish_reason(last), usage, info))

    async def _stream(
        self, first: Started | Finished, events: asyncio.Queue[Event | None], send: Send
    ) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),  # a proxy that buffers would hold the steps back
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for body in self._chunks(first, events):
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _chunks(
        self, first: Started | Finished, events: asyncio.Queue[Event | None]
    ) -> AsyncIterator[bytes]:
        writer, manner, facts = self._writer, self._manner, self._facts
        start = writer.start()
        event: Event | None = first
        if manner.has_steps and isinstance(event, Started):
            start["elastic_cache"] = self._start_info(event)
        yield server_event(start)
        while isinstance(event, (Started, Progress)):
            if isinstance(event, Progress) and (event.delta or manner.has_steps):
                chunk = writer.chunk(event.delta, None)
                if manner.has_steps:
                    decode = facts.tokenizer.decode
                    chunk["elastic_cache"] = step_info(event, facts.num_layers, decode)
                yield server_event(chunk)
            event = await events.get()
        if event is None:
            return
        if isinstance(event, Failed):
            body: ErrorBody = self._error(event.error).body
            yield server_event(body)
            return
        self._note(event)
        chunk = writer.chunk(event.delta, finish_reason(event))
        chunk["elastic_cache"] = statistics(event)
        yield server_event(chunk)
        if manner.has_usage:
            yield server_event(writer.usage(usage_of(event, facts.prompt_tokens)))
        yield END_OF_STREAM

    def _start_info(self, started: Started) -> StartInfo:
        return {
            "prompt_tokens": self._facts.prompt_tokens,
            "gen_length": self._facts.gen_length,
            "queue_seconds": started.queue_seconds,
            "num_layers": self._facts.num_layers,
            "eos_id": self._facts.eos_id,
        }

    def _note(self, finished: Finished) -> None:
        self._record.finish(finished)
        self._metrics.add_answer(finished.timing)

    def _error(self, error: Exception) -> ApiError:
        """What the client is told of a failed request."""
        if isinstance(error, ServiceClosedError):
            self._record.outcome = "closed"
            return unavailable()
        if isinstance(error, ValueError):
            self._record.outcome = "invalid"
            return from_value_error(error)
        self._record.outcome = "failed"
        logger.error("the request failed", exc_info=error, extra={FIELDS: {"id": self._record.id}})
        if isinstance(error, ElasticCacheError):
            return ApiError(500, str(error), code="generation_failed")
        return internal_error(self._record.id)

    @asynccontextmanager
    async def _follow(self, receive: Receive) -> AsyncIterator[asyncio.Queue[Event | None]]:
        """The queue into which the service's events come, and None when the client has gone."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        watcher = asyncio.create_task(_wait_for_disconnect(receive))
        watcher.add_done_callback(lambda _: self._leave(queue))

        def forward(event: Event) -> None:
            # A loop that was closed by force has nobody left who waits.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(queue.put_nowait, event)

        self._ticket.listen(self._listener(forward))
        try:
            yield queue
        finally:
            watcher.cancel()
            self._ticket.cancel()

    def _leave(self, queue: asyncio.Queue[Event | None]) -> None:
        """The client is gone, or the response is over: nobody waits for more."""
        self._ticket.cancel()
        queue.put_nowait(None)

    def _listener(self, forward: Callable[[Event], None]) -> Callable[[Event], None]:
        """Called from the service's thread; steps are counted there, also those not forwarded."""
        last_step: float | None = None

        def listen(event: Event) -> None:
            nonlocal last_step
            now = time.perf_counter()
            if isinstance(event, Progress) and last_step is not None:
                self._metrics.add_step(now - last_step)
            last_step = now
            if self._manner.is_stream or not isinstance(event, Progress):
                forward(event)

        return listen


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
