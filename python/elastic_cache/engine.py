"""The one loop: plan -> forward -> decode -> commit -> event.

    policy.plan      which rows this step computes
    forward.run      the layers, against the cache; refreshed from the failing layer on
    decoder.decode   a token and a confidence per candidate
    ops.commit       which of them become text
A request's state is a DecodeState; only `Request.step` changes its tokens. Nothing outlives a
request but the model, so a failed request leaves the engine usable.
"""

from __future__ import annotations

import dataclasses
import difflib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from elastic_cache import ops
from elastic_cache.cache import Cache
from elastic_cache.config import GenerationConfig
from elastic_cache.decoding import CommitRule, Decoder
from elastic_cache.device import find_device
from elastic_cache.errors import NonFiniteLogitsError
from elastic_cache.forward import Forward
from elastic_cache.models import load_model
from elastic_cache.models.weights import Model
from elastic_cache.plan import Plan
from elastic_cache.policies import make_policy
from elastic_cache.prompt import Prompt, encode_prompt
from elastic_cache.state import (
    STATUS_MASKED,
    STATUS_NOT_FINITE,
    DecodeState,
)
from elastic_cache.types import Generation, Message, Step

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load(name: str, device: str = "cpu", dtype: str = "float32") -> Engine:
    """Loads a checkpoint and returns an engine that generates with it.

    Args:
        name: "tiny" (the embedded model), a checkpoint folder, or a hub id.
        device: "cpu", "cuda" or "cuda:N".
        dtype: "float32" or "bfloat16", the type of weights, cache and activations.

    Raises:
        ValueError: one sentence that says what is wrong with an argument or the checkpoint.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return Engine(load_model(name, find_device(device), DTYPES[dtype]))


class Engine:
    """Generates text with a loaded masked-diffusion model.

    Attributes:
        model: the loaded checkpoint (config, weights, tokenizer, device, dtype).
    """

    def __init__(self, model: Model) -> None:
        self.model = model

    def generate(
        self, prompt: str | Sequence[Message] | Sequence[int] | torch.Tensor, **settings: Any
    ) -> Generation:
        """Answers one prompt.

        Args:
            prompt: text (the chat template is applied), chat messages
                (`[{"role": "user", "content": "..."}]`), or token ids, used as they are. Ids may
                contain the mask id: those positions are filled in (infilling).
            gen_length: masked positions appended to the prompt (default 512).
            policy: "elastic" (default), "none", "prefix" or "dual".
            window: leftmost masked positions decoded per step (default 16).
            gamma: drift threshold of `elastic`; a mean cosine below it refreshes (default 0.9).
                Above 1 every step refreshes, at 0 or below none does.
            threshold: confidence from which a candidate is committed (default 0.9); the best
                candidate always is.
            track_num: tracked tokens per layer (default 1).
            block_caching: False computes every masked position in every step, not only the
                window's (default True).
            block_length: block size of `prefix` and `dual` (default 32).
            tokens_per_step: commit exactly this many best candidates a step instead.
            steps: Fast-dLLM's fixed number of steps (`prefix` and `dual`) instead.
            factor: Fast-dLLM's factor rule instead.
            temperature: 0 takes the most likely token (default), above 0 samples.
            seed: makes sampling repeatable.
            trace: keep one `Step` per forward in `Generation.trace` (default False).

        Returns:
            Generation: ids, text, counts, seconds and, if asked for, the trace.

        Raises:
            ValueError: a sentence naming the argument and the rule it breaks.
            NonFiniteLogitsError: the model produced NaN.
        """
        trace = settings.pop("trace", False)
        stream = self.stream(prompt, **settings)
        steps = list(stream)
        return dataclasses.replace(stream.result, trace=steps) if trace else stream.result

    def stream(
        self, prompt: str | Sequence[Message] | Sequence[int] | torch.Tensor, **settings: Any
    ) -> Request:
        """Like `generate`, step by step: iterate the returned request for its `Step`s.

        Errors in the arguments are raised here, before the first step. `request.tokens()` is the
        sequence as it stands; after the last step `request.result` is the Generation.
        """
        config = _settings(settings)
        return Request(self.model, encode_prompt(self.model, prompt, config.gen_length), config)


class Request:
    """One prompt being answered; an iterator of its steps.

    Attributes:
        prompt: the encoded prompt.
        settings: the validated settings.
    """

    def __init__(self, model: Model, prompt: Prompt, settings: GenerationConfig) -> None:
        config, device = model.config, model.device
        self.prompt = prompt
        self.settings = settings
        self._model = model
        self._started = time.perf_counter()
        self._state = DecodeState.start(
            prompt.ids.to(device),
            prompt.masked.to(device),
            config.num_layers,
            settings.track_num,
        )
        self._policy = make_policy(self._state, settings, config.eos_id)
        cache = Cache(
            config, 1, self._state.capacity, self._policy.needs, model.device, model.dtype
        )
        self._forward = Forward(model, cache)
        self._decoder = Decoder(model, settings)
        self._rule = CommitRule(settings, 1, device)
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

    @torch.inference_mode()
    def step(self) -> Step | None:
        """Runs one denoising step; None when the answer is finished."""
        plan = None if self._result else self._policy.plan(self._state)
        if plan is None:
            self._result = self._result or self._finish()
            return None
        hidden, first_full = self._forward.run(plan, self._state)
        token, confidence = self._decoder.decode(hidden)
        self._rule.prepare(plan)
        state = self._state
        ops.commit(
            token,
            confidence,
            plan.candidates,
            self._rule.rule,
            self._rule.amount,
            state.key_range,
            self._model.config.eos_id if self._policy.drops_tail_at_eos else -1,
            state.tokens,
            state.masked,
            state.committed,
            state.eos_position,
            state.status,
        )
        step = self._report(plan, first_full, confidence)
        self._policy.observe(step)
        return step

    def tokens(self) -> torch.Tensor:
        """The sequence as it stands, int64 [T] on the CPU; undecoded positions hold the mask id."""
        return self._state.tokens[0].to("cpu", copy=True)

    @property
    def result(self) -> Generation:
        """The finished answer; available after the last step."""
        if self._result is None:
            raise RuntimeError("the answer is not finished: iterate the request to its end first")
        return self._result

    def _report(self, plan: Plan, first_full: int, confidence: torch.Tensor) -> Step:
        """Reads back what the commit did, counts the step, and notes the EOS that cuts the tail."""
        status = self._state.status[0].tolist()
        if status[STATUS_NOT_FINITE]:
            raise NonFiniteLogitsError(
                f"the model produced logits that are not finite numbers at step "
                f"{self._num_steps} (in {status[STATUS_NOT_FINITE]} of {len(confidence)} rows): "
                f"check the checkpoint {self._model.name!r} and the dtype"
            )
        index, depth = self._num_steps, self._model.config.num_layers
        first_full = -1 if index == 0 else first_full
        hit = self._state.committed.view(-1)[plan.candidates]
        positions = plan.candidates[hit]
        tracked = self._state.tracked if plan.drift is not None else None
        self._num_steps += 1
        self._layers_refreshed += depth - first_full
        committed = positions.tolist()
        tokens = self._state.tokens.view(-1)[positions].tolist()
        eos = self._model.config.eos_id
        if self._cut < 0 and eos in tokens:
            self._cut = committed[tokens.index(eos)]
        return Step(
            index=index,
            first_full_layer=first_full,
            committed=committed,
            tokens=tokens,
            confidence=confidence[hit].tolist(),
            tracked=_positions(tracked),
            num_rows=self._state.capacity if plan.is_full else plan.rows.numel(),
            num_masked=status[STATUS_MASKED],
        )

    def _finish(self) -> Generation:
        """Fills the tail after EOS and counts what was generated before it."""
        ids, masked, eos = self.tokens(), self.prompt.masked, self._model.config.eos_id
        if self._cut >= 0:
            ids[masked & (torch.arange(len(ids)) > self._cut)] = eos
        end = _first_eos(ids, masked, eos)
        has_eos = end >= 0
        answer = ids[self.prompt.text_start : end if has_eos else len(ids)]
        tokenizer, depth = self._model.tokenizer, self._model.config.num_layers
        return Generation(
            ids=ids,
            text=None if tokenizer is None else tokenizer.decode(answer.tolist()),
            num_tokens=int(masked[: end if has_eos else len(ids)].sum()),
            nfe=self._num_steps,
            update_frequency=self._layers_refreshed / (depth * max(self._num_steps, 1)),
            seconds=time.perf_counter() - self._started,
            finish_reason="eos" if has_eos else "length",
            settings=dataclasses.asdict(self.settings),
        )


def _settings(given: dict[str, Any]) -> GenerationConfig:
    known = [field.name for field in dataclasses.fields(GenerationConfig)]
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            raise ValueError(f"there is no setting {name!r}: {hint}")
    return GenerationConfig(**given)


def _positions(tracked: torch.Tensor | None) -> list[int]:
    if tracked is None:
        return []
    return sorted({position for position in tracked.flatten().tolist() if position >= 0})


def _first_eos(ids: torch.Tensor, masked: torch.Tensor, eos: int) -> int:
    """Leftmost generated EOS, -1 if there is none."""
    found = ((ids == eos) & masked).nonzero()
    return int(found[0]) if len(found) else -1
