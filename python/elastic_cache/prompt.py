"""What the user gave -> token ids with the positions to decode marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from typing_extensions import TypeIs

from elastic_cache.models.tokenizer import Tokenizer
from elastic_cache.models.weights import Model
from elastic_cache.types import Message


@dataclass(frozen=True)
class Prompt:
    """An encoded request.

    Attributes:
        ids: int64 [T] on the CPU, the mask id where something is to be decoded.
        masked: bool [T], which positions are to be decoded.
        text_start: where `Generation.text` starts: at the answer, or at 0 when infilling.
    """

    ids: torch.Tensor
    masked: torch.Tensor
    text_start: int


def encode_prompt(
    model: Model, prompt: str | Sequence[Message] | Sequence[int] | torch.Tensor, gen_length: int
) -> Prompt:
    """Encodes `prompt` and appends `gen_length` masks.

    Raises:
        ValueError: an empty prompt, ids outside the vocabulary, a literal mask token in a text,
            a sequence longer than the model's, or nothing to decode.
    """
    config = model.config
    ids = encode_ids(model, prompt)
    is_infilling = bool((ids == config.mask_id).any())
    if gen_length == 0 and not is_infilling:
        raise ValueError(
            "gen_length must be at least 1, got 0 (0 is for token ids that contain masks)"
        )
    total = len(ids) + gen_length
    if total > config.max_length:
        raise ValueError(
            f"the prompt of {len(ids)} tokens and gen_length {gen_length} make {total} tokens, "
            f"but {model.name!r} takes at most {config.max_length}"
        )
    ids = torch.cat([ids, torch.full((gen_length,), config.mask_id)])
    masked = ids == config.mask_id
    return Prompt(ids, masked, 0 if is_infilling else total - gen_length)


def encode_ids(
    model: Model, prompt: str | Sequence[Message] | Sequence[int] | torch.Tensor
) -> torch.Tensor:
    """Token ids of what the user gave, int64 [P] on the CPU; a text becomes a chat of one message.

    Raises:
        ValueError: an empty prompt, ids outside the vocabulary, or a literal mask token in a text.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError("the prompt is empty: give some text")
        return _encode_chat(model, [{"role": "user", "content": prompt}])
    return _encode_chat(model, prompt) if _is_chat(prompt) else _check_ids(model, prompt)


def encode_raw(model: Model, text: str) -> torch.Tensor:
    """Token ids of a text without the chat template, int64 [P] on the CPU.

    Raises:
        ValueError: there is no tokenizer, the text is empty or contains the mask token.
    """
    if not text:
        raise ValueError("the prompt is empty: give some text")
    return _encode_text(model, _tokenizer(model), text)


def _is_chat(
    prompt: Sequence[Message] | Sequence[int] | torch.Tensor,
) -> TypeIs[Sequence[Message]]:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], dict)


def _encode_chat(model: Model, messages: Sequence[Message]) -> torch.Tensor:
    tokenizer = _tokenizer(model)
    return _encode_text(model, tokenizer, tokenizer.render_chat(messages))


def _tokenizer(model: Model) -> Tokenizer:
    if model.tokenizer is None:
        raise ValueError(f"{model.name!r} has no tokenizer.json: give the prompt as token ids")
    return model.tokenizer


def _encode_text(model: Model, tokenizer: Tokenizer, text: str) -> torch.Tensor:
    ids = tokenizer.encode(text)
    if model.config.mask_id in ids:
        raise ValueError(
            "the prompt contains the mask token as text; to fill in masks, give token ids "
            f"with {model.config.mask_id} at the positions to decode"
        )
    return torch.tensor(ids, dtype=torch.int64)


def _check_ids(model: Model, prompt: Sequence[int] | torch.Tensor) -> torch.Tensor:
    try:
        ids = torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            "the prompt must be text, chat messages or token ids, "
            f"got {type(prompt).__name__} that holds no whole numbers"
        ) from None
    if ids.dim() == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.dim() != 1:
        raise ValueError(f"prompt ids must be one sequence [P], got shape {list(ids.shape)}")
    if ids.numel() == 0:
        raise ValueError("the prompt is empty: give at least one token id")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"prompt ids must be whole numbers, got {ids.dtype}")
    ids = ids.to("cpu", torch.int64)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= model.config.vocab_size:
        raise ValueError(
            f"prompt ids must be between 0 and {model.config.vocab_size - 1}, "
            f"got {low if low < 0 else high}"
        )
    return ids
