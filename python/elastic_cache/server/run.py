"""Serves until a signal: then nothing new is accepted, and what runs gets time to finish.

The subtle thing: uvicorn closes its socket first and then waits for answers without end. Here the
service is closed first, while the socket still answers 503 to whoever comes; only then does
uvicorn stop, with a few seconds for what has been answered to reach its readers.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from elastic_cache.server.log import FIELDS, logger
from elastic_cache.service import Service

_FLUSH_SECONDS = 5
"""For the last bytes of finished answers; a reader that takes longer is cut off."""


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address; port 0 takes a free one.

    Raises:
        ValueError: the address cannot be bound, in a sentence.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot listen at {host} port {port}: {reason}") from None
    return bound


def serve(
    app: FastAPI,
    service: Service,
    bound: socket.socket,
    grace: float,
    when_ready: Callable[[], None],
) -> None:
    """Serves at a bound socket until SIGINT or SIGTERM; a second signal ends at once.

    Args:
        app: of `create_app`, with the service.
        service: closed before this returns.
        grace: seconds that running requests get to finish once a signal has come.
        when_ready: called when requests are accepted.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=_FLUSH_SECONDS,
    )
    try:
        _Server(config, service, grace, when_ready).run(sockets=[bound])
    finally:
        service.close(0)


class _Server(uvicorn.Server):
    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        grace: float,
        when_ready: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._service = service
        self._grace = grace
        self._when_ready = when_ready
        self._is_closing = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._when_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._is_closing:
            self.should_exit = self.force_exit = True
            return
        self._is_closing = True
        threading.Thread(target=self._close, name="close", daemon=True).start()

    def _close(self) -> None:
        self.config.app.state.is_closing = True  # type: ignore[union-attr]
        stats = self._service.stats()
        fields = {"running": stats.num_running, "queued": stats.num_queued, "grace": self._grace}
        logger.info("shutting down", extra={FIELDS: fields})
        try:
            self._service.close(self._grace)
        finally:
            self.should_exit = True
