"""Around every request: its key, the size of its body, its log line, and a 500 for a failure."""

from __future__ import annotations

import hmac
import logging

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from elastic_cache.server.errors import ApiError, internal_error
from elastic_cache.server.log import FIELDS, logger
from elastic_cache.server.metrics import Metrics
from elastic_cache.server.record import Record

API_PREFIX = "/v1/"
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/models")
QUIET = ("/", "/health", "/metrics", "/openapi.json")
"""Paths that are asked again and again: neither logged nor counted."""


class Guard:
    """The outermost layer of the application.

    Args:
        app: what it guards.
        api_key: what /v1/ demands; None lets everyone in.
        max_body: bytes of a body, at most.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, max_body: int, metrics: Metrics) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._max_body = max_body
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = Record()
        scope.setdefault("state", {})["record"] = record

        async def send_noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.id
            await send(message)

        try:
            await self._answer(record, scope, receive, send_noted)
        finally:
            if scope["path"] not in QUIET:
                self._write(record, scope)

    async def _answer(self, record: Record, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        try:
            if scope["path"].startswith(API_PREFIX):
                self._check_key(headers)
            self._check_length(headers.get("content-length"))
            await self._app(scope, self._counted(receive), send)
        except ApiError as error:
            await error.response()(scope, receive, send)
        except Exception:
            logger.exception("the request failed", extra={FIELDS: {"id": record.id}})
            record.outcome = "failed"
            if record.status is None:
                await internal_error(record.id).response()(scope, receive, send)

    def _check_key(self, headers: Headers) -> None:
        if self._key is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # Latin-1 gives back the bytes that were sent, whatever they are.
        is_right = hmac.compare_digest(given.strip().encode("latin-1"), self._key)
        if scheme.lower() != "bearer" or not is_right:
            what = "a wrong API key was given" if given else "this server needs an API key"
            raise ApiError(
                401,
                f"{what}: send it in the header 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_length(self, given: str | None) -> None:
        if given is not None and given.isdigit() and int(given) > self._max_body:
            raise self._too_large()

    def _counted(self, receive: Receive) -> Receive:
        """`receive`, as far as the body may go: a chunked body does not tell its size before."""
        num_bytes = 0

        async def receive_counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                if num_bytes > self._max_body:
                    raise self._too_large()
            return message

        return receive_counted

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body must be at most {self._max_body} bytes long",
            code="body_too_large",
            headers={"Connection": "close"},
        )

    def _write(self, record: Record, scope: Scope) -> None:
        path, outcome = scope["path"], record.ended_as()
        # A label for every path that someone makes up would never end.
        self._metrics.count(path if path in ENDPOINTS else "other", outcome)
        fields = {
            "id": record.id,
            "method": scope["method"],
            "path": path,
            "status": record.status,
            "outcome": outcome,
            "seconds": round(record.seconds, 4),
            **record.fields,
        }
        level = logging.ERROR if outcome == "failed" else logging.INFO
        logger.log(level, "request", extra={FIELDS: fields})
