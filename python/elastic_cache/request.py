"""One prompt being answered, as the host sees it: its policy, its text so far, its answer."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from elastic_cache.config import GenerationConfig
from elastic_cache.errors import NonFiniteLogitsError
from elastic_cache.models.weights import Model
from elastic_cache.policies import Policy
from elastic_cache.prompt import Prompt
from elastic_cache.types import Generation, Step


@dataclass(frozen=True)
class Decoded:
    """What a step was for a sequence.

    Attributes:
        committed, tokens, confidence: positions, and of each its token and the model's probability.
        num_candidates: positions that were decoded.
        first_full: first layer that ran in full mode, L when none did.
        num_rows: rows computed per reuse layer.
        num_masked: positions still masked.
        num_not_finite: candidates without a probability.
        tracked: positions to be computed in the next step.
        similarity: what the drift test found in the layers before `first_full`.
    """

    committed: list[int]
    tokens: list[int]
    confidence: list[float]
    num_candidates: int
    first_full: int
    num_rows: int
    num_masked: int
    num_not_finite: int
    tracked: list[int]
    similarity: list[float]


class Request:
    """One prompt being answered; an iterator of its steps.

    Attributes:
        prompt: the encoded prompt.
        settings: the validated settings.
        policy: plans its steps.

    Args:
        advance: runs the request's next step.
    """

    def __init__(
        self,
        model: Model,
        prompt: Prompt,
        settings: GenerationConfig,
        policy: Policy,
        advance: Callable[[], Step | None],
    ) -> None:
        self.prompt = prompt
        self.settings = settings
        self.policy = policy
        self._model = model
        self._advance = advance
        self._started = time.perf_counter()
        self._ids: list[int] = prompt.ids.tolist()
        self._masked: list[bool] = prompt.masked.tolist()
        self._num_steps = 0
        self._layers_refreshed = 0
        self._cut = -1
        self._result: Generation | None = None

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        step = self.step()
        if step is None:
            raise StopIteration
        return step

    def step(self) -> Step | None:
        """Runs one denoising step; None when the answer is finished."""
        return None if self.is_finished else self._advance()

    def tokens(self) -> torch.Tensor:
        """The sequence as it stands, int64 [T] on the CPU; undecoded positions hold the mask id."""
        return torch.tensor(self._ids, dtype=torch.int64)

    @property
    def is_finished(self) -> bool:
        """Whether `result` is there."""
        return self._result is not None

    @property
    def result(self) -> Generation:
        """The finished answer; available after the last step."""
        if self._result is None:
            raise RuntimeError("the answer is not finished: iterate the request to its end first")
        return self._result

    def stop(self, reason: str) -> Generation:
        """Ends the request now; the answer as it stands, with `finish_reason` as given.

        Positions not decoded hold the mask id in `ids` and are left out of `text`. Of a request
        that is finished it is the result.
        """
        if self._result is None:
            self._result = self._answer(reason)
        return self._result

    def finish(self) -> None:
        """Makes the result; nothing is left to decode."""
        self._result = self._answer(None)

    def candidates(self, count: int) -> list[int]:
        """The leftmost `count` positions that are not decoded, or as many as there are."""
        end = len(self._ids) if self._cut < 0 else self._cut
        return list(islice((i for i in range(end) if self._masked[i]), count))

    def commit(self, positions: list[int], tokens: list[int], num_masked: int) -> None:
        """Writes what a step committed, notes the EOS that cuts the tail, and tells the policy."""
        for position, token in zip(positions, tokens, strict=True):
            self._ids[position] = token
            self._masked[position] = False
        eos = self._model.config.eos_id
        if self._cut < 0 and eos in tokens:
            self._cut = positions[tokens.index(eos)]
        self.policy.observe(tokens, num_masked)

    def add(self, decoded: Decoded) -> Step:
        """Counts a step, whose commits have been written.

        Raises:
            NonFiniteLogitsError: candidates have no probability; nothing was written.
        """
        if decoded.num_not_finite:
            raise NonFiniteLogitsError(
                f"the model produced logits that are not finite numbers at step "
                f"{self._num_steps} (in {decoded.num_not_finite} of {decoded.num_candidates} "
                f"rows): check the checkpoint {self._model.name!r} and the dtype"
            )
        index, depth = self._num_steps, self._model.config.num_layers
        first_full = -1 if index == 0 else decoded.first_full
        self._num_steps += 1
        self._layers_refreshed += depth - first_full
        return Step(
            index=index,
            first_full_layer=first_full,
            committed=decoded.committed,
            tokens=decoded.tokens,
            confidence=decoded.confidence,
            tracked=decoded.tracked,
            similarity=decoded.similarity if self.policy.tests_drift and first_full >= 0 else [],
            num_rows=decoded.num_rows,
            num_masked=decoded.num_masked,
        )

    def _answer(self, reason: str | None) -> Generation:
        """Fills the tail after EOS and counts what was generated before it."""
        ids, generated, config = self.tokens(), self.prompt.masked, self._model.config
        decoded = ~torch.tensor(self._masked)
        if self._cut >= 0:
            tail = generated & (torch.arange(len(ids)) > self._cut)
            ids[tail], decoded[tail] = config.eos_id, True
        eos_at = _first(generated & (ids == config.eos_id))
        end = len(ids) if eos_at < 0 else eos_at
        start, tokenizer = self.prompt.text_start, self._model.tokenizer
        answer = ids[start:end][decoded[start:end]]
        return Generation(
            ids=ids,
            text=None if tokenizer is None else tokenizer.decode(answer.tolist()),
            num_tokens=int((generated & decoded)[:end].sum()),
            nfe=self._num_steps,
            update_frequency=self._layers_refreshed / (config.num_layers * max(self._num_steps, 1)),
            seconds=time.perf_counter() - self._started,
            finish_reason=reason or ("length" if eos_at < 0 else "eos"),
            settings=dataclasses.asdict(self.settings),
        )


def _first(flags: torch.Tensor) -> int:
    """Index of the first one that is set, -1 if there is none."""
    found = flags.nonzero()
    return int(found[0]) if len(found) else -1
