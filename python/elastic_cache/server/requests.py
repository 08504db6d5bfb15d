"""What clients send: OpenAI's fields that can be honoured, and the engine's own.

A field that this server cannot honour is refused in a sentence and never silently ignored; only
the values that ask for nothing (`n: 1`, `tools: []`, null) pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from elastic_cache.config import POLICIES, GenerationConfig
from elastic_cache.server.errors import ApiError, from_value_error, shown
from elastic_cache.types import Message

SERVED_POLICIES = tuple(policy for policy in POLICIES if policy not in ("prefix", "dual"))
"""Those that the service takes: blocks are decoded one request at a time."""

MAX_SEED = 2**63 - 1
COMMIT_RULES = ("tokens_per_step", "steps", "factor")
_LENGTHS = ("gen_length", "max_tokens", "max_completion_tokens")
_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}


class Only:
    """Metadata of a field that cannot be honoured: null and `allowed` pass, the rest is refused.

    Args:
        why: the rest of a sentence that begins with the field's name.
        allowed: values that ask for nothing.
    """

    def __init__(self, why: str, *allowed: Any) -> None:
        self._why = why
        self._allowed = (None, *allowed)

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": list(self._allowed)}

    def _check(self, value: Any) -> Any:
        for allowed in self._allowed:
            # True equals 1 in Python, but not in JSON.
            if value == allowed and isinstance(value, bool) == isinstance(allowed, bool):
                return value
        raise PydanticCustomError("unsupported", "{why}", {"why": self._why})


_NO_TOOLS = "is not supported: the model calls no tools"
_NO_PENALTY = "is not supported: tokens are not penalised"
_NO_SOUND = "is not supported: the model reads and writes text only"
_NO_LOGPROBS = "is not supported; stream_steps gives the confidence of every token"
_ONE_ANSWER = "must be 1: there is one answer a request"


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, Only("is not supported", False)] = None


class Fields(BaseModel):
    """What both kinds of completion take."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stream_steps: bool | None = Field(None, description="Send what every step did.")
    max_tokens: int | None = Field(None, ge=0, description="As gen_length.")
    gen_length: int | None = Field(None, ge=0, description="Tokens of the answer, at most.")
    temperature: float | None = Field(None, ge=0, le=100)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)

    policy: Annotated[str, Field(json_schema_extra={"enum": list(SERVED_POLICIES)})] | None = None
    window: int | None = Field(None, ge=1)
    gamma: float | None = None
    threshold: float | None = Field(None, ge=0, le=1)
    track_num: int | None = Field(None, ge=1)
    num_rows: int | None = Field(None, ge=1)
    block_length: int | None = Field(None, ge=1)
    block_caching: bool | None = None
    tokens_per_step: int | None = Field(None, ge=1)
    steps: int | None = Field(None, ge=1)
    factor: float | None = Field(None, ge=0)

    deadline: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="Seconds until there must be an answer."
    )
    max_steps: int | None = Field(None, ge=1, description="Denoising steps, at most.")
    priority: int | None = Field(None, description="The highest leaves the queue first.")

    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    store: Annotated[Any, Only("is not supported: answers are not kept", False)] = None
    n: Annotated[Any, Only(_ONE_ANSWER, 1)] = None
    top_p: Annotated[Any, Only("must be 1: sampling takes all tokens", 1)] = None
    frequency_penalty: Annotated[Any, Only(_NO_PENALTY, 0)] = None
    presence_penalty: Annotated[Any, Only(_NO_PENALTY, 0)] = None
    logit_bias: Annotated[Any, Only("is not supported", {})] = None
    stop: Annotated[Any, Only("is not supported: an answer ends at EOS or gen_length", [])] = None

    @property
    def is_stream(self) -> bool:
        return bool(self.stream)

    @property
    def has_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def length(self) -> int | None:
        """gen_length, under whichever of its names it is given."""
        given = {name: getattr(self, name, None) for name in _LENGTHS}
        given = {name: value for name, value in given.items() if value is not None}
        if len(set(given.values())) > 1:
            names = " and ".join(given)
            raise ApiError(400, f"{names} mean the same: give one of them", next(iter(given)))
        return next(iter(given.values()), None)

    def settings(self, defaults: Mapping[str, Any], max_length: int) -> dict[str, Any]:
        """The settings asked for over the server's; gen_length only if the request has it.

        Args:
            max_length: tokens that a request may have, the bound of every count.
        """
        for name in ("stream_options", "stream_steps"):
            if getattr(self, name) and not self.stream:
                raise ApiError(400, f"{name} needs stream to be true", name)
        names = [field.name for field in dataclasses.fields(GenerationConfig)]
        given = {n: getattr(self, n) for n in names if getattr(self, n) is not None}
        if (length := self.length()) is not None:
            given["gen_length"] = length
        for name, value in given.items():
            if isinstance(value, int) and name not in ("seed", "gen_length") and value > max_length:
                raise ApiError(400, f"{name} must be at most {max_length}, got {value}", name)
        # Commit rules exclude each other: one that is asked for takes the place of the server's.
        has_rule = any(name in given for name in COMMIT_RULES)
        dropped = {"gen_length", *(COMMIT_RULES if has_rule else ())}
        kept = {name: value for name, value in defaults.items() if name not in dropped}
        try:
            GenerationConfig(**(kept | given))
        except ValueError as error:
            raise from_value_error(error) from None
        return kept | given


def _text(content: Any) -> str:
    """A message's content, a string or parts of text, as one text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise PydanticCustomError(
            "wrong", "must be a string or a list of text parts, got {it}", {"it": shown(content)}
        )
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise PydanticCustomError(
                "wrong", "may hold parts of type text only, got {it}", {"it": shown(kind or part)}
            )
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise PydanticCustomError(
                "wrong",
                "must have parts of type and text, got {it}",
                {"it": shown(part)},
            )
        texts.append(part["text"])
    return "\n".join(texts)


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str,
        BeforeValidator(_text),
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}]}),
    ]
    name: Annotated[Any, Only("is not supported: a message has a role alone")] = None
    refusal: Annotated[Any, Only("is not supported")] = None
    annotations: Annotated[Any, Only("is not supported", [])] = None
    tool_calls: Annotated[Any, Only(_NO_TOOLS, [])] = None
    function_call: Annotated[Any, Only(_NO_TOOLS)] = None
    audio: Annotated[Any, Only(_NO_SOUND)] = None


class ChatRequest(Fields):
    """Body of /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0, description="As gen_length.")

    tools: Annotated[Any, Only(_NO_TOOLS, [])] = None
    tool_choice: Annotated[Any, Only(_NO_TOOLS, "none")] = None
    parallel_tool_calls: Annotated[Any, Only(_NO_TOOLS)] = None
    functions: Annotated[Any, Only(_NO_TOOLS, [])] = None
    function_call: Annotated[Any, Only(_NO_TOOLS, "none")] = None
    response_format: Annotated[
        Any, Only('must be {"type": "text"}: other formats are not supported', {"type": "text"})
    ] = None
    logprobs: Annotated[Any, Only(_NO_LOGPROBS, False)] = None
    top_logprobs: Annotated[Any, Only(_NO_LOGPROBS, 0)] = None
    modalities: Annotated[Any, Only(_NO_SOUND, ["text"])] = None
    audio: Annotated[Any, Only(_NO_SOUND)] = None
    prediction: Annotated[Any, Only("is not supported")] = None
    reasoning_effort: Annotated[Any, Only("is not supported", "none")] = None
    verbosity: Annotated[Any, Only("is not supported")] = None
    web_search_options: Annotated[Any, Only("is not supported")] = None

    def chat(self) -> list[Message]:
        """The messages as the chat template takes them; "developer" is a later name of "system"."""
        return [
            {"role": "system" if m.role == "developer" else m.role, "content": m.content}
            for m in self.messages
        ]


def _one_prompt(prompt: Any) -> Any:
    """Refuses several prompts in one request."""
    is_list = isinstance(prompt, list)
    is_ids = is_list and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt)
    if isinstance(prompt, str) or (is_ids and prompt):
        return prompt
    if is_list and prompt and all(isinstance(item, (str, list)) for item in prompt):
        raise PydanticCustomError(
            "unsupported", "must be one prompt a request, a string or a list of token ids"
        )
    raise PydanticCustomError(
        "wrong", "must be a string or a list of token ids, got {it}", {"it": shown(prompt)}
    )


class CompletionRequest(Fields):
    """Body of /v1/completions."""

    prompt: Annotated[
        str | list[int],
        BeforeValidator(_one_prompt),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string", "minLength": 1},
                    {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                ]
            }
        ),
    ]

    best_of: Annotated[Any, Only(_ONE_ANSWER, 1)] = None
    echo: Annotated[Any, Only("is not supported", False)] = None
    suffix: Annotated[Any, Only("is not supported; token ids with masks in them are filled in")] = (
        None
    )
    logprobs: Annotated[Any, Only(_NO_LOGPROBS)] = None
