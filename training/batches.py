"""Training batches, made on the fly: problem -> tokens -> masks, everything from one seed.

A pool is 8 batches made of problems of its own seed. Its samples are sorted by length before they
are cut into batches, so that a batch needs almost no padding and no attention mask.

Two ways of masking, because each alone failed:
- uniform, as LLaDA trains: a random share r of the answer is masked, loss / r;
- windowed, as decoding sees it: all before a cut visible, a partly masked window after it, only
  masks behind the window; the loss is on the window.
The subtle thing is the length of a sample: some EOS follow the answer, as many as decoding with a
larger gen_length would leave, or the model works only at the lengths it was trained at.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from problems import chat, held_out, training_problems, validation
from tokenizers import Tokenizer
from torch.utils.data import Dataset

BATCHES_PER_POOL = 8
LONGEST = 768
_USUAL_LONGEST, _LONG_POOLS = 448, 0.25
_UNIFORM_SHARE = 0.25
_WINDOW = (12, 32)
_EOS_WEIGHT = 0.1
_LENGTH_STEP = 32  # few different lengths, so that few attention shapes are tuned and compiled
_NUM_EXCLUDED = 2000


class Batch(NamedTuple):
    """What one step needs; loss = sum(weights * cross entropy of the rows)."""

    ids: torch.Tensor  # [B, T] int64, the mask token where something is hidden
    rows: torch.Tensor  # [M] int64, flat indices into ids of the positions to predict
    targets: torch.Tensor  # [M] int64
    weights: torch.Tensor  # [M] float32


class Pools(Dataset):
    """Pool i of a run: a list of BATCHES_PER_POOL batches, the same on every machine."""

    def __init__(self, tokenizer_path: str, config: dict, batch_size: int, seed: int) -> None:
        self._tokenizer_path, self._tokenizer = tokenizer_path, None
        self._eos, self._mask = config["eos_token_id"], config["mask_token_id"]
        self._eot = config["eot_token_id"]
        self._batch_size, self._seed = batch_size, seed
        pairs = held_out(_NUM_EXCLUDED) + validation(_NUM_EXCLUDED)
        self._excluded = frozenset(question for question, _ in pairs)

    def __getitem__(self, index: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_000 + index)
        count = self._batch_size * BATCHES_PER_POOL
        samples = self._samples(index, count)
        lengths = torch.tensor([len(prompt) + len(answer) for prompt, answer in samples])
        totals = _total_lengths(lengths, generator)
        batches = []
        for part in totals.argsort(stable=True).view(BATCHES_PER_POOL, self._batch_size):
            part = part[torch.randperm(self._batch_size, generator=generator)]
            width = int(totals[part].max())
            ids = torch.full((self._batch_size, width), self._eos)
            for row, i in enumerate(part.tolist()):
                ids[row, : lengths[i]] = torch.tensor(sum(samples[i], []))
            prompt_lengths = torch.tensor([len(samples[i][0]) for i in part.tolist()])
            batches.append(self._mask_batch(ids, prompt_lengths, lengths[part], generator))
        order = torch.randperm(BATCHES_PER_POOL, generator=generator)
        return [batches[i] for i in order.tolist()]

    def _samples(self, index: int, count: int) -> list[tuple[list[int], list[int]]]:
        if self._tokenizer is None:  # made in the worker: the object does not travel
            self._tokenizer = Tokenizer.from_file(self._tokenizer_path)
        samples: list[tuple[list[int], list[int]]] = []
        stream = training_problems(self._seed, index, self._excluded)
        while len(samples) < count:
            question, answer = next(stream)
            prompt_ids = self._tokenizer.encode(chat(question)).ids
            answer_ids = [*self._tokenizer.encode(answer).ids, self._eot, self._eos]
            if len(prompt_ids) + len(answer_ids) <= _USUAL_LONGEST:
                samples.append((prompt_ids, answer_ids))
        return samples

    def _mask_batch(
        self,
        ids: torch.Tensor,
        prompt_lengths: torch.Tensor,
        lengths: torch.Tensor,
        generator: torch.Generator,
    ) -> Batch:
        b, n = ids.shape
        num_uniform = max(1, round(b * _UNIFORM_SHARE))
        weight = torch.where(ids == self._eos, _EOS_WEIGHT, 1.0)
        u, w = slice(0, num_uniform), slice(num_uniform, b)
        hidden_u, target_weight_u = _uniform(ids[u], prompt_lengths[u], weight[u], generator)
        hidden_w, target_weight_w = _windowed(
            ids[w], prompt_lengths[w], lengths[w], weight[w], generator
        )
        # Each way counts by its share of the samples; the sum is 2, as if each counted once.
        target_weight = torch.cat(
            [target_weight_u * 2 * num_uniform / b, target_weight_w * 2 * (b - num_uniform) / b]
        )
        hidden = torch.cat([hidden_u, hidden_w])
        rows = target_weight.flatten().nonzero().squeeze(1)
        return Batch(
            ids=torch.where(hidden, self._mask, ids),
            rows=rows,
            targets=ids.flatten()[rows],
            weights=target_weight.flatten()[rows].float(),
        )


def _total_lengths(lengths: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Length of each sample with the EOS behind it, a multiple of _LENGTH_STEP.

    In one pool of four, an eighth of the samples may be longer than usual: together they make
    one long batch, where spread over all pools they would widen a batch of each.
    """
    n = len(lengths)
    has_long = torch.rand(1, generator=generator) < _LONG_POOLS
    is_long = (torch.arange(n) < n // BATCHES_PER_POOL) & has_long
    longest = torch.where(is_long, LONGEST, _USUAL_LONGEST)
    share = torch.rand(n, generator=generator).pow(1.5)
    totals = lengths + (share * (longest - lengths)).long()
    return (totals + _LENGTH_STEP - 1) // _LENGTH_STEP * _LENGTH_STEP


def _uniform(
    ids: torch.Tensor,
    prompt_lengths: torch.Tensor,
    weight: torch.Tensor,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is hidden and what each hidden position weighs in the loss, both [b, T]."""
    b, n = ids.shape
    answer = torch.arange(n)[None] >= prompt_lengths[:, None]
    # Ratios spread evenly over the batch: less noise than independent draws.
    ratio = (torch.arange(b) / b + torch.rand(1, generator=generator)) % 1 * 0.95 + 0.05
    hidden = (torch.rand(b, n, generator=generator) < ratio[:, None]) & answer
    return hidden, hidden * weight / ratio[:, None] / (answer * weight).sum()


def _windowed(
    ids: torch.Tensor,
    prompt_lengths: torch.Tensor,
    lengths: torch.Tensor,
    weight: torch.Tensor,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    b, n = ids.shape
    position = torch.arange(n)[None]
    room = (lengths - prompt_lengths).clamp(min=1)
    cut = (prompt_lengths + (torch.rand(b, generator=generator) * room).long())[:, None]
    low, high = _WINDOW
    end = cut + torch.randint(low, high + 1, (b, 1), generator=generator)
    window = (position >= cut) & (position < end)
    some = torch.rand(b, n, generator=generator) < torch.rand(b, 1, generator=generator)
    targets = window & some
    total = (targets * weight).sum().clamp(min=1)
    return targets | (position >= end), targets * weight / total
