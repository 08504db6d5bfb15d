"""Plain values that move through the program: what is known of a step and of a finished answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch


class Message(TypedDict):
    """One chat message; role is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Step:
    """One denoising step of one sequence, as it is streamed and traced.

    Attributes:
        index: number of the step, from 0.
        first_full_layer: first layer that ran in full mode: -1 at step 0, 0 when a later step was
            a whole forward, the number of layers when nothing was refreshed.
        committed: positions committed in this step, ascending.
        tokens: the token ids committed there, in the order of `committed`.
        confidence: the model's probability of each of them, in the same order.
        tracked: positions chosen in this step, to be recomputed in the next, ascending: by the
            attention of every layer (elastic), or as the most due ones (rolling).
        similarity: what the drift test found, a mean cosine for each layer before
            `first_full_layer`; empty where nothing was tested.
        num_rows: rows computed per reuse layer.
        num_masked: positions still masked after this step.
    """

    index: int
    first_full_layer: int
    committed: list[int]
    tokens: list[int]
    confidence: list[float]
    tracked: list[int]
    similarity: list[float]
    num_rows: int
    num_masked: int


@dataclass(frozen=True)
class Generation:
    """A finished answer.

    Attributes:
        ids: int64 tensor [prompt + gen_length] on the CPU; everything after the EOS that cut the
            tail is EOS.
        text: the decoded answer up to the first EOS, special tokens removed; None if the
            checkpoint has no tokenizer.
        num_tokens: generated tokens before the first EOS; prompt and filled tail never count.
        nfe: number of forwards (steps).
        update_frequency: sum over steps of (L - first_full_layer) / (L * steps), the share of
            layer executions in full mode as the authors of arXiv 2510.14973 report it.
        seconds: wall-clock seconds from the tokenized prompt to the last commit.
        finish_reason: "eos" when an EOS ended the answer, "length" when it fills gen_length, else
            why it was stopped before it was finished (`Request.stop`).
        settings: the request's settings by name.
        trace: one Step per forward when trace=True was given, else None.
    """

    ids: torch.Tensor
    text: str | None
    num_tokens: int
    nfe: int
    update_frequency: float
    seconds: float
    finish_reason: str
    settings: dict[str, Any]
    trace: list[Step] | None = field(default=None, repr=False)

    @property
    def tokens_per_forward(self) -> float:
        return self.num_tokens / self.nfe if self.nfe else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds if self.seconds else 0.0
