"""What goes wrong, in OpenAI's error form: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from typing_extensions import TypedDict

from elastic_cache.config import GenerationConfig, hint

MAX_SHOWN = 80
"""Characters of a wrong value that an error shows."""

TYPES = {401: "authentication_error", 429: "rate_limit_error"}
"""Of an error by its status; others are the client's mistake below 500 and ours from there on."""

_ARGUMENTS = (
    *(setting.name for setting in dataclasses.fields(GenerationConfig)),
    "deadline",
    "max_steps",
    "priority",
)


class ErrorFields(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    error: ErrorFields


class ApiError(HTTPException):
    """A request that ends with an error; an HTTPException, which FastAPI lets through everywhere.

    Args:
        status: of HTTP.
        message: a sentence for the client.
        param: the field of the request that is wrong, if it is one.
        code: a word for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.param = param
        self.code = code

    @property
    def body(self) -> ErrorBody:
        status, message = self.status_code, self.detail
        kind = TYPES.get(status)
        kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status_code, self.headers)


def unavailable() -> ApiError:
    """The answer while the server shuts down."""
    return ApiError(503, "the server is shutting down: try again later", code="shutting_down",
                    headers={"Retry-After": "5"})  # fmt: skip


def internal_error(request_id: str) -> ApiError:
    """The answer to what nobody foresaw; what it was stands in the log, under the id."""
    return ApiError(
        500,
        f"the server failed on this request; its log has the reason under {request_id}",
        code="internal_error",
    )


def from_value_error(error: ValueError) -> ApiError:
    """An argument that the engine refuses: its sentences begin with the argument's name."""
    first = str(error).partition(" ")[0]
    return ApiError(400, str(error), first if first in _ARGUMENTS else None)


def from_validation(errors: Sequence[Any], known: Sequence[str]) -> ApiError:
    """The first of pydantic's errors as a sentence; `known` are the fields of the request."""
    error = errors[0]
    path = [part for part in error["loc"] if part != "body"]
    name = _name(path)
    kind = error["type"]
    if kind == "json_invalid":
        reason = error.get("ctx", {}).get("error", "it cannot be parsed")
        return ApiError(400, f"the body must be JSON: {reason} at character {path[0]}")
    if not path:
        return ApiError(400, "the body must be a JSON object, sent as application/json")
    if kind == "extra_forbidden":
        return ApiError(400, _unknown(name, str(path[-1]), known), name, "unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"{name} is missing: it must be given", name, "missing_parameter")
    if kind == "unsupported":
        return ApiError(400, f"{name} {error['msg']}", name, "unsupported_parameter")
    if kind == "wrong":
        return ApiError(400, f"{name} {error['msg']}", name)
    rule = error["msg"].replace("Input should be", "must be")
    return ApiError(400, f"{name} {rule}, got {shown(error.get('input'))}", name)


def shown(value: object) -> str:
    """A wrong value as an error shows it."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def _name(path: Sequence[Any]) -> str:
    """("messages", 0, "content") -> messages[0].content"""
    name = ""
    for part in path:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    return name if len(name) <= MAX_SHOWN else name[:MAX_SHOWN] + "..."


def _unknown(name: str, last: str, known: Sequence[str]) -> str:
    return f"there is no field {name}: {hint(last, known, 'docs/serving.md lists the fields')}"
