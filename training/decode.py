"""Batched decoding by full recompute, to watch a training run: the policy `none` and nothing else.

Every step is a whole forward; in each sequence the leftmost `window` masked positions are
predicted and those with confidence >= min(threshold, best) committed. The first time EOS is among
them, the masks to the right of the leftmost one are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from elastic_cache.problems import final_number
from network import Network
from problems import chat
from tokenizers import Tokenizer


@dataclass(frozen=True)
class Answer:
    """A decoded answer: its ids before the first EOS, and the forwards it took."""

    ids: list[int]
    nfe: int


@dataclass(frozen=True)
class Score:
    """Exact matches and tokens per forward over a set of problems."""

    correct: int
    count: int
    tokens_per_forward: float


@torch.no_grad()
def decode(
    network: Network,
    prompts: Sequence[list[int]],
    *,
    mask_id: int,
    eos_id: int,
    gen_length: int = 256,
    window: int = 16,
    threshold: float = 0.9,
) -> list[Answer]:
    """Answers of all prompts, decoded side by side."""
    device = network.wte.weight.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    width = int(lengths.max()) + gen_length
    ids = torch.full((len(prompts), width), mask_id, device=device)
    for i, prompt in enumerate(prompts):
        ids[i, : len(prompt)] = torch.tensor(prompt, device=device)
    position = torch.arange(width, device=device)[None]
    exists = position < lengths[:, None] + gen_length
    masked = exists & (position >= lengths[:, None])
    is_cut = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    nfe = torch.zeros(len(prompts), dtype=torch.int64, device=device)
    while (active := masked.any(1).nonzero().squeeze(1)).numel():
        nfe[active] += 1
        in_window = masked[active] & (masked[active].cumsum(1) <= window)
        rows = in_window.flatten().nonzero().squeeze(1)
        logits = network(ids[active], rows, keys=exists[active][:, None, None])
        best, token = logits.double().softmax(-1).max(-1)
        confidence = torch.zeros(in_window.shape, dtype=torch.float64, device=device)
        confidence[in_window] = best
        bar = confidence.amax(1, keepdim=True).clamp(max=threshold)
        committed = in_window & (confidence >= bar)
        predicted = ids[active]
        predicted[in_window] = token
        ids[active] = torch.where(committed, predicted, ids[active])
        masked[active] &= ~committed
        _drop_tail(masked, is_cut, active, committed & (predicted == eos_id))
    ids = torch.where(ids == mask_id, eos_id, ids).cpu()
    answers = []
    for i, prompt in enumerate(prompts):
        answer = ids[i, len(prompt) : len(prompt) + gen_length].tolist()
        end = answer.index(eos_id) if eos_id in answer else len(answer)
        answers.append(Answer(answer[:end], int(nfe[i])))
    return answers


def _drop_tail(
    masked: torch.Tensor, is_cut: torch.Tensor, active: torch.Tensor, is_eos: torch.Tensor
) -> None:
    cuts_now = is_eos.any(1) & ~is_cut[active]
    first = is_eos.int().argmax(1)
    behind = torch.arange(masked.shape[1], device=masked.device)[None] > first[:, None]
    masked[active] &= ~(behind & cuts_now[:, None])
    is_cut[active] |= cuts_now


def score(
    network: Network,
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[str, str]],
    *,
    mask_id: int,
    eos_id: int,
    batch_size: int = 128,
) -> Score:
    """Decodes the questions and compares the numbers after "####"."""
    correct = num_tokens = num_forwards = 0
    for start in range(0, len(pairs), batch_size):
        part = pairs[start : start + batch_size]
        prompts = [tokenizer.encode(chat(question)).ids for question, _ in part]
        answers = decode(network, prompts, mask_id=mask_id, eos_id=eos_id)
        for (_, expected), answer in zip(part, answers, strict=True):
            correct += final_number(tokenizer.decode(answer.ids)) == final_number(expected)
            num_tokens += len(answer.ids)
            num_forwards += answer.nfe
    return Score(correct, len(pairs), num_tokens / max(1, num_forwards))
