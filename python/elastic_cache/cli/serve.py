"""`elastic-cache serve`: an OpenAI-compatible server and a page to watch answers denoise."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from elastic_cache import env
from elastic_cache.cli import options as shared
from elastic_cache.config import MAX_FULL_ROWS

if TYPE_CHECKING:
    from elastic_cache.service import Service


def add_command(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "serve",
        help="answer over HTTP, as OpenAI's API does",
        description="Answers over HTTP, as OpenAI's API does, with a page to watch at /. "
        "The generation settings are those of requests that do not give them.",
    )
    shared.add_model(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address (default 127.0.0.1)")
    group.add_argument(
        "--port", type=int, default=8000, metavar="N", help="0 takes a free one (default 8000)"
    )
    group.add_argument(
        "--api-key", metavar="KEY", help=f"clients must send it (default: what {env.API_KEY} says)"
    )
    counts = (
        ("--concurrency", 8, "N", "requests answered together"),
        ("--max-queue", 64, "N", "requests waiting; more are refused"),
        (
            "--max-full-rows",
            MAX_FULL_ROWS,
            "N",
            "positions computed in full in a step, at most: fewer make shorter steps for those "
            "who wait for their next token, and a later first one for who joins",
        ),
        ("--max-body", 1 << 18, "BYTES", "size of a request"),
        ("--max-prompt", None, "TOKENS", "length of a prompt (default: --max-length)"),
        (
            "--max-length",
            None,
            "TOKENS",
            "prompt and answer together (default: 2048, or the model's)",
        ),
    )
    for flag, default, metavar, text in counts:
        told = "" if default is None else f" (default {default})"
        group.add_argument(flag, type=int, default=default, metavar=metavar, help=text + told)
    shared.add_batch_invariant(group)
    group.add_argument(
        "--grace",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="for running requests to finish after SIGTERM or Ctrl-C (default 30)",
    )
    shared.add_policy(parser)
    shared.add_settings(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    settings = shared.read_request(options)
    _check(options)
    key = options.api_key or env.read_api_key()
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"serve needs the package {error.name}: run pip install 'elastic-cache[serve]'"
        ) from None

    from elastic_cache.engine import load
    from elastic_cache.server import ServerOptions, create_app
    from elastic_cache.server.log import log_to_stderr
    from elastic_cache.server.run import bind, serve
    from elastic_cache.service import Service

    bound = bind(options.host, options.port)  # a taken port is told before a model is loaded
    engine = load(
        options.model,
        device=options.device,
        dtype=options.dtype,
        batch_invariant=options.batch_invariant,
    )
    server_options = ServerOptions(settings, key, options.max_body, options.max_prompt)
    service = Service(
        engine,
        options.concurrency,
        options.max_queue,
        options.max_length,
        options.max_full_rows,
    )
    _try_out(service, settings)
    app = create_app(service, engine.model, server_options)
    log_to_stderr()
    port = bound.getsockname()[1]

    def tell() -> None:
        print(_welcome(options, port, key is not None), flush=True)

    serve(app, service, bound, options.grace, tell)
    return 0


def _check(options: argparse.Namespace) -> None:
    least_of = dict(concurrency=1, max_queue=0, max_full_rows=1, max_body=1, max_prompt=1)
    for name, least in least_of.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not 0 <= options.port <= 65535:
        raise ValueError(f"port must be between 0 and 65535, got {options.port}")
    if not (options.grace >= 0 and math.isfinite(options.grace)):
        raise ValueError(f"grace must be a number of seconds from 0 on, got {options.grace}")
    if options.api_key is not None and not options.api_key.strip():
        raise ValueError("api-key must not be empty; leave it out to let everyone in")


def _try_out(service: Service, settings: dict[str, Any]) -> None:
    """One step with the default settings: what refuses them does so before anyone asks, and the
    first who asks need not wait for what only a first step does."""
    room = min(settings["gen_length"], service.max_length - 1)
    service.submit([0], max_steps=1, **(settings | {"gen_length": room})).result()


def _welcome(options: argparse.Namespace, port: int, has_key: bool) -> str:
    """What is printed when the server is ready."""
    host = f"[{options.host}]" if ":" in options.host else options.host
    url = f"http://{host}:{port}"
    header = " -H 'Authorization: Bearer KEY'" if has_key else ""
    lines = [
        f"elastic-cache serves {options.model} at {url}",
        f"  page    {url}/",
        f"  openai  OpenAI(base_url={url + '/v1'!r}, api_key={'KEY' if has_key else '-'!r})",
        f"  curl    {url}/v1/chat/completions -H 'Content-Type: application/json'{header} \\",
        """            -d '{"messages": [{"role": "user", "content": "..."}], "stream": true}'""",
        "Ctrl-C ends it.",
    ]
    if not has_key and options.host not in ("127.0.0.1", "localhost", "::1"):
        lines.insert(
            1, "  note    whoever reaches this address can use it: --api-key KEY asks for a key"
        )
    return "\n".join(lines)
