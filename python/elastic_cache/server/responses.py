"""What the server answers: OpenAI's objects, and what this engine knows beyond them.

TypedDicts, because the OpenAPI schema is made of them and a stream writes hundreds a second.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from typing_extensions import NotRequired, TypedDict

from elastic_cache.events import Finished, Progress

FinishReason = Literal["stop", "length"]


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Statistics(TypedDict):
    """Of a finished answer. Seconds count from submission; steps in milliseconds."""

    finish_reason: str
    complete: bool
    nfe: int
    update_frequency: float
    tokens_per_forward: float
    seconds: float
    queue_seconds: float
    first_token_seconds: float | None
    step_p50_ms: float
    step_p99_ms: float


class Token(TypedDict):
    """A committed token; `position` counts from the start of the prompt.

    `text` is empty for a special token, and no text (U+FFFD) for a part of a character.
    """

    position: int
    id: int
    text: str
    confidence: float


class StepInfo(TypedDict):
    """What a step did, and the text as it stands behind what is final."""

    step: int
    provisional: str
    committed: list[Token]
    first_full_layer: int
    num_layers: int
    num_rows: int
    num_masked: int


class StartInfo(TypedDict):
    """The request left the queue; its answer starts at position `prompt_tokens`."""

    prompt_tokens: int
    gen_length: int
    queue_seconds: float
    num_layers: int
    eos_id: int


Info = Statistics | StepInfo | StartInfo


class AnswerMessage(TypedDict):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    index: int
    message: AnswerMessage
    logprobs: None
    finish_reason: FinishReason


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    elastic_cache: Statistics


class ChatDelta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]


class ChunkChoice(TypedDict):
    index: int
    delta: ChatDelta
    logprobs: None
    finish_reason: FinishReason | None


class ChatChunk(TypedDict):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: NotRequired[Usage | None]
    elastic_cache: NotRequired[Info]


class TextChoice(TypedDict):
    index: int
    text: str
    logprobs: None
    finish_reason: FinishReason | None


class Completion(TypedDict):
    """Both a whole answer and a chunk of a stream, as OpenAI has it."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: NotRequired[Usage | None]
    elastic_cache: NotRequired[Info]


class ModelFacts(TypedDict):
    """What a request can ask of the model; lengths in tokens."""

    policies: list[str]
    defaults: dict[str, Any]
    max_length: int
    max_prompt: int
    num_layers: int
    mask_id: int
    eos_id: int


class ModelCard(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    elastic_cache: ModelFacts


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelCard]


class Health(TypedDict):
    status: Literal["ok", "closing"]
    model: str
    queued: int
    running: int


class Writer(Protocol):
    """Writes one answer in the form of its endpoint."""

    def start(self) -> Any:
        """The first chunk of a stream."""

    def chunk(self, text: str, finish_reason: FinishReason | None) -> Any:
        """A chunk with a piece of text."""

    def usage(self, usage: Usage) -> Any:
        """The last chunk, where usage was asked for."""

    def answer(self, text: str, reason: FinishReason, usage: Usage, info: Statistics) -> Any:
        """The whole answer at once."""


class ChatWriter:
    """For /v1/chat/completions."""

    def __init__(self, answer_id: str, created: int, model: str) -> None:
        self._id, self._created, self._model = answer_id, created, model

    def start(self) -> ChatChunk:
        return self._chunk({"role": "assistant", "content": ""}, None)

    def chunk(self, text: str, finish_reason: FinishReason | None) -> ChatChunk:
        return self._chunk({"content": text} if text else {}, finish_reason)

    def usage(self, usage: Usage) -> ChatChunk:
        return {**self.chunk("", None), "choices": [], "usage": usage}

    def answer(
        self, text: str, reason: FinishReason, usage: Usage, info: Statistics
    ) -> ChatCompletion:
        message: AnswerMessage = {"role": "assistant", "content": text, "refusal": None}
        return {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._model,
            "choices": [
                {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
            ],
            "usage": usage,
            "elastic_cache": info,
        }

    def _chunk(self, delta: ChatDelta, finish_reason: FinishReason | None) -> ChatChunk:
        return {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
            "choices": [
                {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
            ],
        }


class CompletionWriter:
    """For /v1/completions."""

    def __init__(self, answer_id: str, created: int, model: str) -> None:
        self._id, self._created, self._model = answer_id, created, model

    def start(self) -> Completion:
        return self.chunk("", None)

    def chunk(self, text: str, finish_reason: FinishReason | None) -> Completion:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": [
                {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
            ],
        }

    def usage(self, usage: Usage) -> Completion:
        return {**self.chunk("", None), "choices": [], "usage": usage}

    def answer(self, text: str, reason: FinishReason, usage: Usage, info: Statistics) -> Completion:
        return {**self.chunk(text, reason), "usage": usage, "elastic_cache": info}


def finish_reason(finished: Finished) -> FinishReason:
    """OpenAI's word: "stop" at EOS, "length" where something ended the answer before."""
    return "stop" if finished.generation.finish_reason == "eos" else "length"


def usage_of(finished: Finished, prompt_tokens: int) -> Usage:
    generated = finished.generation.num_tokens
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
    }


def statistics(finished: Finished) -> Statistics:
    generation, timing = finished.generation, finished.timing
    return {
        "finish_reason": generation.finish_reason,
        "complete": finished.is_complete,
        "nfe": generation.nfe,
        "update_frequency": generation.update_frequency,
        "tokens_per_forward": generation.tokens_per_forward,
        "seconds": timing.total,
        "queue_seconds": timing.queue,
        "first_token_seconds": timing.first_token,
        "step_p50_ms": 1000 * timing.step_p50,
        "step_p99_ms": 1000 * timing.step_p99,
    }


def step_info(
    progress: Progress, num_layers: int, decode: Callable[[Sequence[int]], str]
) -> StepInfo:
    """What a step did; `decode` is the tokenizer's."""
    step = progress.step
    return {
        "step": step.index,
        "provisional": progress.provisional,
        "committed": [
            {
                "position": position,
                "id": token,
                "text": decode([token]),
                "confidence": round(confidence, 4),
            }
            for position, token, confidence in zip(
                step.committed, step.tokens, step.confidence, strict=True
            )
        ],
        "first_full_layer": step.first_full_layer,
        "num_layers": num_layers,
        "num_rows": step.num_rows,
        "num_masked": step.num_masked,
    }


def server_event(value: Any) -> bytes:
    """A chunk as a server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


END_OF_STREAM = b"data: [DONE]\n\n"
