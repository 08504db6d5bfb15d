"""The one loop: plan -> launch -> finish -> event.

    policy.plan      which rows this step computes
    runner.launch    the layers against the cache, a token and a confidence per candidate, the
                     commit, and the rows of the next step
    runner.finish    waits; layers behind a failed drift test are refreshed
On a GPU the next step is launched before the last one's event is handed out, so that the GPU never
waits for who reads it. A runner is lent to one request at a time; a request that fails or is
abandoned does not give it back, so whatever went wrong in it is gone.
"""

from __future__ import annotations

import dataclasses
import difflib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from elastic_cache.config import GenerationConfig
from elastic_cache.device import find_device
from elastic_cache.errors import NonFiniteLogitsError
from elastic_cache.memory import SCRATCH_BYTES, check_memory
from elastic_cache.models import load_model
from elastic_cache.models.weights import Model
from elastic_cache.policies import Policy, make_policy
from elastic_cache.prompt import Prompt, encode_prompt
from elastic_cache.report import (
    SEGMENT_WINDOW,
    STATUS_MASKED,
    STATUS_NOT_FINITE,
)
from elastic_cache.runner import (
    Runner,
    RunnerShape,
    Start,
    capacity_for,
    capture_stream,
    runner_bytes,
)
from elastic_cache.types import Generation, Message, Step

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


_MAX_IDLE_RUNNERS = 8
"""Requests of so many lengths or kinds take turns without capturing their steps anew."""


def load(name: str, device: str = "cpu", dtype: str = "float32", capture: bool = True) -> Engine:
    """Loads a checkpoint and returns an engine that generates with it.

    Args:
        name: "tiny" (the embedded model), a checkpoint folder, or a hub id.
        device: "cpu", "cuda" or "cuda:N".
        dtype: "float32" or "bfloat16", the type of weights, cache and activations.
        capture: on a GPU, run the steps that reuse the cache as CUDA graphs (default); False
            launches the same kernels one by one, with the same results.

    Raises:
        ValueError: one sentence that says what is wrong with an argument or the checkpoint.
    """
    kind = find_dtype(dtype)
    return Engine(load_model(name, find_device(device), kind), capture)


def find_dtype(name: str) -> torch.dtype:
    """The dtype of that name; ValueError if it is none that the operators have."""
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


class Engine:
    """Generates text with a loaded masked-diffusion model.

    Attributes:
        model: the loaded checkpoint (config, weights, tokenizer, device, dtype).
    """

    def __init__(self, model: Model, capture: bool = True) -> None:
        self.model = model
        self._runners = RunnerPool(model, capture)

    def generate(
        self, prompt: str | Sequence[Message] | Sequence[int] | torch.Tensor, **settings: Any
    ) -> Generation:
        """Answers one prompt.

        Args:
            prompt: text (the chat template is applied), chat messages
                (`[{"role": "user", "content": "..."}]`), or token ids, used as they are. Ids may
                contain the mask id: those positions are filled in (infilling).
            gen_length: masked positions appended to the prompt (default 512).
            policy: "elastic" (default), "none", "prefix", "dual" or "rolling".
            window: leftmost masked positions decoded per step (default 16).
            gamma: drift threshold of `elastic`; a mean cosine below it refreshes (default 0.9).
                Above 1 every step refreshes, at 0 or below none does.
            threshold: confidence from which a candidate is committed (default 0.9); the best
                candidate always is.
            track_num: tracked tokens per layer (default 1).
            block_caching: False computes every masked position in every step, not only the
                window's (default True).
            block_length: block size of `prefix` and `dual` (default 32).
            num_rows: rows that `rolling` computes in every step, the window among them
                (default 96).
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
        config = find_settings(settings)
        encoded = encode_prompt(self.model, prompt, config.gen_length)
        return Request(self.model, self._runners, encoded, config)


def runner_shape(
    model: Model, policy: Policy, settings: GenerationConfig, length: int
) -> RunnerShape:
    """The runner that a request for a sequence of `length` positions needs."""
    return RunnerShape(
        capacity=capacity_for(length, model),
        needs=policy.needs,
        num_candidates=policy.num_candidates,
        track_num=policy.num_rows or settings.track_num,
        selects_rows=policy.window > 0,
        tests_drift=policy.tests_drift,
        rolling=policy.rolling,
        has_noise=settings.temperature > 0,
        eos_id=model.config.eos_id if policy.drops_tail_at_eos else -1,
    )


class RunnerPool:
    """Idle runners, most recently used last."""

    def __init__(self, model: Model, capture: bool) -> None:
        self._model = model
        self._capture_stream = capture_stream(model.device, capture)
        self._idle: list[Runner] = []

    def take(self, shape: RunnerShape) -> Runner:
        """A runner of that shape, an idle one if there is one.

        Raises:
            ValueError: the GPU has no room for it, even without the idle ones.
        """
        for index in reversed(range(len(self._idle))):
            if self._idle[index].shape == shape:
                return self._idle.pop(index)
        device, what = self._model.device, "the caches and buffers of this request"
        needed = runner_bytes(self._model, shape) + SCRATCH_BYTES
        advice = "shorten the prompt or gen_length"
        try:
            check_memory(device, needed, what, advice)
        except ValueError:
            if not self._idle:
                raise
            self._idle.clear()
            check_memory(device, needed, what, advice)
        return Runner(self._model, shape, self._capture_stream)

    def give(self, runner: Runner) -> None:
        """Keeps a runner that has finished its request."""
        self._idle = [*self._idle, runner][-_MAX_IDLE_RUNNERS:]


class Request:
    """One prompt being answered; an iterator of its steps.

    Attributes:
        prompt: the encoded prompt.
        settings: the validated settings.
    """

    def __init__(
        self, model: Model, runners: RunnerPool, prompt: Prompt, settings: GenerationConfig
    ) -> None:
        self.prompt = prompt
        self.settings = settings
        self._model = model
        self._started = time.perf_counter()
        self._ids: list[int] = prompt.ids.tolist()
        policy = make_policy(prompt.masked.tolist(), settings, model.config.eos_id)
        self._policy = policy
        self._runners = runners
        self._runner = runners.take(runner_shape(model, policy, settings, len(prompt.ids)))
        start = Start(
            prompt.ids, prompt.masked, policy.window, policy.lookahead, policy.num_rows, settings
        )
        self._report = self._runner.start(start)
        self._runs_ahead = model.device.type != "cpu"
        self._num_steps = 0
        self._layers_refreshed = 0
        self._cut = -1
        self._result: Generation | None = None
        self._launched: _Launched | None = None

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        step = self.step()
        if step is None:
            raise StopIteration
        return step

    def step(self) -> Step | None:
        """Runs one denoising step; None when the answer is finished."""
        if self._result is not None:
            return None
        launched = self._launched or self._launch()
        if launched is None:
            self._result = self._finish()
            self._runners.give(self._runner)
            return None
        first_full, self._report = self._runner.finish()
        step = self._describe(launched, first_full)
        self._policy.observe(step)
        self._launched = self._launch() if self._runs_ahead else None
        return step

    @property
    def is_finished(self) -> bool:
        """Whether `result` is there."""
        return self._result is not None

    def stop(self, reason: str) -> Generation:
        """Ends the request now; the answer as it stands, with `finish_reason` as given.

        Positions not decoded hold the mask id in `ids` and are left out of `text`.
        """
        if self._result is None:
            self._result = self._finish(reason)
        return self._result

    def tokens(self) -> torch.Tensor:
        """The sequence as it stands, int64 [T] on the CPU; undecoded positions hold the mask id."""
        return torch.tensor(self._ids, dtype=torch.int64)

    @property
    def result(self) -> Generation:
        """The finished answer; available after the last step."""
        if self._result is None:
            raise RuntimeError("the answer is not finished: iterate the request to its end first")
        return self._result

    def _launch(self) -> _Launched | None:
        """Enqueues the next step, if there is one."""
        segments = self._report.segments[0].tolist()
        plan = self._policy.plan(sum(segments[1:]), segments[SEGMENT_WINDOW])
        if plan is None:
            return None
        if plan.listed is None:
            candidates = self._report.candidates[: plan.num_candidates].tolist()
        else:
            candidates = list(plan.listed[: plan.num_candidates])
        self._runner.launch(plan)
        num_rows = len(self._ids) if plan.is_full else plan.num_rows
        return _Launched(candidates, num_rows)

    def _describe(self, launched: _Launched, first_full: int) -> Step:
        """Counts the step, writes what it committed, and notes the EOS that cuts the tail."""
        report, candidates = self._report, launched.candidates
        status = report.status[0].tolist()
        if status[STATUS_NOT_FINITE]:
            raise NonFiniteLogitsError(
                f"the model produced logits that are not finite numbers at step "
                f"{self._num_steps} (in {status[STATUS_NOT_FINITE]} of {len(candidates)} rows): "
                f"check the checkpoint {self._model.name!r} and the dtype"
            )
        index, depth = self._num_steps, self._model.config.num_layers
        first_full = -1 if index == 0 else first_full
        # As lists: indexing a handful of elements by tensors costs more than all of this.
        flags, token = report.is_committed.tolist(), report.token.tolist()
        confidence = report.confidence.tolist()
        hits = [i for i in range(len(candidates)) if flags[i]]
        committed, tokens = [candidates[i] for i in hits], [token[i] for i in hits]
        self._num_steps += 1
        self._layers_refreshed += depth - first_full
        for position, token_id in zip(committed, tokens, strict=True):
            self._ids[position] = token_id
        eos = self._model.config.eos_id
        if self._cut < 0 and eos in tokens:
            self._cut = committed[tokens.index(eos)]
        return Step(
            index=index,
            first_full_layer=first_full,
            committed=committed,
            tokens=tokens,
            confidence=[confidence[i] for i in hits],
            tracked=_positions(report.tracked),
            similarity=self._similarity(first_full),
            num_rows=launched.num_rows,
            num_masked=status[STATUS_MASKED],
        )

    def _similarity(self, first_full: int) -> list[float]:
        """What the drift test found in the layers it reached."""
        if not self._policy.tests_drift or first_full < 0:
            return []
        similarity: list[float] = self._report.similarity[:first_full].flatten().tolist()
        return similarity

    def _finish(self, reason: str | None = None) -> Generation:
        """Fills the tail after EOS and counts what was generated before it."""
        ids, masked, eos = self.tokens(), self.prompt.masked, self._model.config.eos_id
        if self._cut >= 0:
            ids[masked & (torch.arange(len(ids)) > self._cut)] = eos
        end = _first_eos(ids, masked, eos)
        has_eos = end >= 0
        end = end if has_eos else len(ids)
        decoded = ids != self._model.config.mask_id
        answer = ids[self.prompt.text_start : end]
        answer = answer[decoded[self.prompt.text_start : end]]
        tokenizer, depth = self._model.tokenizer, self._model.config.num_layers
        return Generation(
            ids=ids,
            text=None if tokenizer is None else tokenizer.decode(answer.tolist()),
            num_tokens=int((masked & decoded)[:end].sum()),
            nfe=self._num_steps,
            update_frequency=self._layers_refreshed / (depth * max(self._num_steps, 1)),
            seconds=time.perf_counter() - self._started,
            finish_reason=reason or ("eos" if has_eos else "length"),
            settings=dataclasses.asdict(self.settings),
        )


@dataclasses.dataclass(frozen=True)
class _Launched:
    """What the host has to remember of a step under way."""

    candidates: list[int]  # positions
    num_rows: int


def find_settings(given: dict[str, Any]) -> GenerationConfig:
    """The settings of those names, checked; ValueError with the name or value that is wrong."""
    known = [field.name for field in dataclasses.fields(GenerationConfig)]
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            raise ValueError(f"there is no setting {name!r}: {hint}")
    return GenerationConfig(**given)


def _positions(tracked: torch.Tensor) -> list[int]:
    return sorted({position for position in tracked.flatten().tolist() if position >= 0})


def _first_eos(ids: torch.Tensor, masked: torch.Tensor, eos: int) -> int:
    """Leftmost generated EOS, -1 if there is none."""
    found = ((ids == eos) & masked).nonzero()
    return int(found[0]) if len(found) else -1
