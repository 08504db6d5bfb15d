"""The application: routes, and how a body becomes a submitted request."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from fastapi import APIRouter, FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

import elastic_cache
from elastic_cache.config import GenerationConfig
from elastic_cache.models.weights import Model
from elastic_cache.prompt import encode_ids, encode_raw
from elastic_cache.server.answer import Answer, Facts, Manner
from elastic_cache.server.errors import (
    ApiError,
    ErrorBody,
    from_validation,
    from_value_error,
    unavailable,
)
from elastic_cache.server.guard import Guard
from elastic_cache.server.metrics import Metrics
from elastic_cache.server.requests import (
    SERVED_POLICIES,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    Fields,
)
from elastic_cache.server.responses import (
    ChatCompletion,
    ChatWriter,
    Completion,
    CompletionWriter,
    Health,
    ModelCard,
    ModelList,
    Writer,
)
from elastic_cache.service import QueueFullError, Service, ServiceClosedError
from elastic_cache.ticket import Ticket

MAX_BODY = 1 << 18
"""Bytes of a body by default: 64 for each of 4,096 tokens. To read a megabyte that is then too
long would hold everybody up for 0.2 s."""

_SETTINGS = tuple(setting.name for setting in dataclasses.fields(GenerationConfig))
_EVENT = {
    "type": "object",
    "description": "A server-sent event: data is a chunk, an error, or [DONE].",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}
_STREAM = {"text/event-stream": {"schema": _EVENT}}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "The request is wrong, in a sentence.",
        401: "The API key is missing or wrong.",
        404: "There is no such model.",
        413: "The body is too long.",
        429: "The queue is full; see Retry-After.",
        500: "The server failed.",
        503: "The server is shutting down.",
    }.items()
}
# The page is one file without external parts; its answers come from this server alone.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True)
class ServerOptions:
    """What whoever runs the server decides.

    Attributes:
        defaults: generation settings of requests that do not give them.
        api_key: what clients must send; None lets everyone in.
        max_body: bytes of a request's body, at most.
        max_prompt: tokens of a prompt, at most; None for as many as the service takes.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    api_key: str | None = field(default=None, repr=False)
    max_body: int = MAX_BODY
    max_prompt: int | None = None


def create_app(service: Service, model: Model, options: ServerOptions) -> FastAPI:
    """The ASGI application that answers with `service`.

    `app.state.is_closing` may be set to tell that it ends soon: /health says so then.

    Args:
        service: submits and answers; closing it is up to the caller.
        model: what the service answers with, for its tokenizer and its limits.

    Raises:
        ValueError: the model has no tokenizer, so that there is no text to answer with, or a
            default is wrong.
    """
    server = Server(service, model, options)
    app = FastAPI(
        title="elastic-cache",
        version=elastic_cache.__version__,
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.is_closing = False
    app.add_middleware(
        Guard, api_key=options.api_key, max_body=options.max_body, metrics=server.metrics
    )
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    # For the schema alone: the guard asks for the key before the body is read.
    shown = [Security(HTTPBearer(auto_error=False))] if options.api_key else []
    app.include_router(_api(server), prefix="/v1", dependencies=shown)
    app.include_router(_pages(server))
    return app


def _api(server: Server) -> APIRouter:
    api = APIRouter(responses=_ERRORS)

    @api.post("/chat/completions", responses={200: {"model": ChatCompletion, "content": _STREAM}})
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await server.chat(body, request)

    @api.post("/completions", responses={200: {"model": Completion, "content": _STREAM}})
    async def completion(body: CompletionRequest, request: Request) -> Response:
        return await server.completion(body, request)

    @api.get("/models")
    async def models() -> ModelList:
        return {"object": "list", "data": [server.card]}

    @api.get("/models/{name:path}")
    async def model(name: str) -> ModelCard:
        server.check_model(name)
        return server.card

    return api


def _pages(server: Server) -> APIRouter:
    pages = APIRouter()
    page = resources.files(elastic_cache).joinpath("server/page.html").read_text("utf-8")

    @pages.get("/", response_class=HTMLResponse)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers=_PAGE_HEADERS)

    @pages.get("/health", responses={503: {"model": Health, "description": "Shutting down."}})
    async def health(request: Request) -> Health:
        stats, is_closing = server.service.stats(), request.app.state.is_closing
        body: Health = {
            "status": "closing" if is_closing else "ok",
            "model": server.card["id"],
            "queued": stats.num_queued,
            "running": stats.num_running,
        }
        return JSONResponse(body, 503 if is_closing else 200)  # type: ignore[return-value]

    @pages.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(server.metrics.write(), media_type="text/plain; version=0.0.4")

    return pages


class Server:
    """What the routes share.

    Attributes:
        service: answers.
        metrics: counts.
        card: the model as /v1/models shows it.
    """

    def __init__(self, service: Service, model: Model, options: ServerOptions) -> None:
        if model.tokenizer is None:
            raise ValueError(
                f"{model.name!r} has no tokenizer.json: there is no text to answer with"
            )
        config = model.config
        settings = GenerationConfig(**options.defaults)
        self.service = service
        self.metrics = Metrics(service.stats)
        self._model, self._tokenizer = model, model.tokenizer
        self._defaults = {name: getattr(settings, name) for name in _SETTINGS}
        self._max_length = service.max_length
        self._max_prompt = min(options.max_prompt or self._max_length, self._max_length)
        # A folder's place on this machine is nobody's business; a hub id keeps its owner.
        name = Path(model.name).name if Path(model.name).is_dir() else model.name
        self.card: ModelCard = {
            "id": name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "elastic-cache",
            "elastic_cache": {
                "policies": list(SERVED_POLICIES),
                "defaults": {name: _writable(value) for name, value in self._defaults.items()},
                "max_length": self._max_length,
                "max_prompt": self._max_prompt,
                "num_layers": config.num_layers,
                "mask_id": config.mask_id,
                "eos_id": config.eos_id,
            },
        }

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        writer = ChatWriter(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), self.card["id"])
        return await self._answer(
            body, writer, request, lambda: encode_ids(self._model, body.chat())
        )

    async def completion(self, body: CompletionRequest, request: Request) -> Response:
        writer = CompletionWriter(f"cmpl-{uuid.uuid4().hex}", int(time.time()), self.card["id"])

        def encode() -> torch.Tensor:
            prompt = body.prompt
            if isinstance(prompt, str):
                return encode_raw(self._model, prompt)
            return encode_ids(self._model, prompt)

        return await self._answer(body, writer, request, encode)

    def check_model(self, name: str | None) -> None:
        """Refuses a request for another model than the one served."""
        if name is not None and name != self.card["id"]:
            raise ApiError(
                404,
                f"there is no model {name[:80]!r}: this server has {self.card['id']!r}",
                "model",
                "model_not_found",
            )

    async def _answer(
        self, body: Fields, writer: Writer, request: Request, encode: Callable[[], torch.Tensor]
    ) -> Response:
        self.check_model(body.model)
        settings = body.settings(self._defaults, self._max_length)
        record = request.state.record
        # A long prompt takes a second to encode, in which this thread has others to answer.
        ticket, num_tokens, gen_length = await asyncio.to_thread(
            self._submit, body, settings, encode
        )
        record.fields["prompt_tokens"] = num_tokens
        config = self._model.config
        manner = Manner(body.is_stream, body.has_usage, bool(body.stream_steps))
        facts = Facts(num_tokens, gen_length, config.num_layers, config.eos_id, self._tokenizer)
        return Answer(ticket, writer, manner, facts, record, self.metrics)

    def _submit(
        self, body: Fields, settings: dict[str, Any], encode: Callable[[], torch.Tensor]
    ) -> tuple[Ticket, int, int]:
        """Encodes the prompt and queues the request: ticket, tokens of prompt and of the answer."""
        try:
            ids = encode()
            gen_length = self._gen_length(len(ids), settings.pop("gen_length", None))
            ticket = self.service.submit(
                ids,
                gen_length=gen_length,
                priority=body.priority or 0,
                deadline=body.deadline,
                max_steps=body.max_steps,
                **settings,
            )
        except QueueFullError:
            raise ApiError(
                429,
                "too many requests are waiting: try again later",
                code="queue_full",
                headers={"Retry-After": "1"},
            ) from None
        except ServiceClosedError:
            raise unavailable() from None
        except ValueError as error:
            raise from_value_error(error) from None
        return ticket, len(ids), gen_length

    def _gen_length(self, num_tokens: int, given: int | None) -> int:
        """Tokens of the answer: as asked for, or the default as far as there is room."""
        if num_tokens > self._max_prompt:
            raise ApiError(
                400,
                f"the prompt must be at most {self._max_prompt} tokens long, got {num_tokens}",
                code="context_length_exceeded",
            )
        room = self._max_length - num_tokens
        wanted = min(self._defaults["gen_length"], room) if given is None else given
        if wanted > room or (given is None and room == 0):
            raise ApiError(
                400,
                f"the prompt of {num_tokens} tokens and gen_length {wanted} make "
                f"{num_tokens + wanted} tokens, but at most {self._max_length} are answered",
                code="context_length_exceeded",
            )
        return wanted


def _writable(value: Any) -> Any:
    """A setting as JSON can hold it: gamma may be infinite."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


async def _http_error(request: Request, error: Exception) -> Response:
    """Every refusal in OpenAI's form, also those of the router."""
    if isinstance(error, ApiError):
        return error.response()
    assert isinstance(error, HTTPException)
    path, status = request.url.path, error.status_code
    message = str(error.detail)
    if status == 404:
        message = f"there is nothing at {path[:80]}: the paths are in /openapi.json"
    elif status == 405:
        message = f"{path[:80]} does not take {request.method[:20]}"
    elif status == 400:
        message = "the body must be JSON that can be parsed"
    return ApiError(status, message, headers=error.headers).response()


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    known = [*ChatRequest.model_fields, *CompletionRequest.model_fields, *ChatMessage.model_fields]
    return from_validation(error.errors(), known).response()
