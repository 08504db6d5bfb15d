"""Runs an application of the server on a free port, in a thread of the test process."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import uvicorn
from elastic_cache.server.run import bind

QUESTION = "Ava has 5 apples. Then Ava buys 3 more apples. How many apples does Ava have now?"
MESSAGES = [{"role": "user", "content": QUESTION}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@contextlib.contextmanager
def running(app: Any) -> Iterator[str]:
    """The address of `app` while it runs."""
    bound = bind("127.0.0.1", 0)
    config = uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


def wait_until(holds: Callable[[], object], seconds: float = 20.0) -> None:
    """Returns when `holds()` is true, and fails when it is not after so many seconds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def chunks(response: httpx.Response) -> list[Any]:
    """The chunks of a stream, whose form is checked; the last event must be [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events.pop() == "", "the last event is ended by a blank line"
    assert all(event.startswith("data: ") for event in events)
    data = [event.removeprefix("data: ") for event in events]
    assert data.pop() == "[DONE]"
    return [json.loads(item) for item in data]


def raw_request(url: str, head: str, *, body: bytes = b"") -> socket.socket:
    """A connection on which a request has been sent; `head` has a line break after every line."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n" + body)
    return connection
