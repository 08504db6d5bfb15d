"""Loads a model, and answers with it: requests alone, or several in a batch.

Runners, the buffers and captured steps of a request, are kept and lent to later ones. A request
that fails or is abandoned does not give its runner back, so whatever went wrong in it is gone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from elastic_cache import ops
from elastic_cache.batch import Batch
from elastic_cache.cache import CacheNeeds
from elastic_cache.config import MAX_FULL_ROWS, GenerationConfig, find_settings
from elastic_cache.device import find_device
from elastic_cache.graphs import capture_stream
from elastic_cache.memory import SCRATCH_BYTES, check_memory
from elastic_cache.models import load_model
from elastic_cache.models.weights import Model
from elastic_cache.policies import Policy, make_policy
from elastic_cache.policies.rolling import RollingPolicy
from elastic_cache.prompt import encode_prompt
from elastic_cache.request import Request
from elastic_cache.runner import Runner
from elastic_cache.shape import RunnerShape, capacity_for, runner_bytes
from elastic_cache.types import Generation, Message

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_MAX_IDLE_RUNNERS = 8
"""Requests of so many lengths or kinds take turns without capturing their steps anew."""
MAX_BATCH_LENGTH, MAX_BATCH_WINDOW, MAX_BATCH_ROWS = 2048, 32, 128
"""Of a request in a batch: tokens unless told otherwise, window, and rows of `rolling`."""


def load(
    name: str,
    device: str = "cpu",
    dtype: str = "float32",
    capture: bool = True,
    batch_invariant: bool = False,
) -> Engine:
    """Loads a checkpoint and returns an engine that generates with it.

    Args:
        name: "tiny" (the embedded model), a checkpoint folder, or a hub id.
        device: "cpu", "cuda" or "cuda:N".
        dtype: "float32" or "bfloat16", the type of weights, cache and activations.
        capture: on a GPU, run the steps that reuse the cache as CUDA graphs (default); False
            launches the same kernels one by one, with the same results.
        batch_invariant: as of `Engine`.

    Raises:
        ValueError: one sentence that says what is wrong with an argument or the checkpoint.
    """
    kind = find_dtype(dtype)
    return Engine(load_model(name, find_device(device), kind), capture, batch_invariant)


def find_dtype(name: str) -> torch.dtype:
    """The dtype of that name; ValueError if it is none that the operators have."""
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


class Engine:
    """Generates text with a loaded masked-diffusion model.

    Args:
        model: the loaded checkpoint (config, weights, tokenizer, device, dtype); an attribute, too.
        capture: as of `load`.
        batch_invariant: in a batch, no bit of what is computed for a request depends on the other
            requests: it gets the same tokens whoever is there. On the CPU that is so anyway. On a
            GPU it takes bfloat16, compute capability 9.0 and a model whose sizes are multiples of
            64, and passes of more than 256 rows get slower (docs/serving.md has figures); without
            it a near tie may fall otherwise.

    Raises:
        ValueError: batch_invariant cannot be had for this model on this device.
    """

    def __init__(self, model: Model, capture: bool = True, batch_invariant: bool = False) -> None:
        if batch_invariant:
            check_batch_invariant(model)
        self.model = model
        self._runners = RunnerPool(model, capture, batch_invariant)

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
        policy = make_policy(encoded.masked.tolist(), config, self.model.config.eos_id)
        shape = runner_shape(self.model, policy, config, len(encoded.ids))
        runner = self._runners.take(shape)
        batch = Batch(self.model, runner, is_alone=True, give_back=self._runners.give)
        return batch.begin(encoded, config, policy)

    def batch(
        self,
        num_lanes: int,
        max_length: int | None = None,
        max_full_rows: int = MAX_FULL_ROWS,
    ) -> Batch:
        """Lanes in which requests of policy elastic, rolling or none are answered together.

        Args:
            num_lanes: the most requests at a time.
            max_length: the most tokens of a request, prompt and gen_length together (default:
                2,048, or what the model takes if that is less).
            max_full_rows: positions computed in full mode in a step, at most, through all layers;
                of a longer sequence some layers run in each of several steps. It bounds a step's
                time when requests join or are refreshed.

        Raises:
            ValueError: a wrong argument, or the GPU has no room.
        """
        longest = self.model.config.max_length
        capacity = min(MAX_BATCH_LENGTH, longest) if max_length is None else max_length
        if num_lanes < 1:
            raise ValueError(f"num_lanes must be at least 1, got {num_lanes}")
        if max_full_rows < 1:
            raise ValueError(f"max_full_rows must be at least 1, got {max_full_rows}")
        if not 1 <= capacity <= longest:
            raise ValueError(f"max_length must be between 1 and {longest}, got {capacity}")
        runner = self._runners.take(batch_shape(self.model, num_lanes, capacity))
        return Batch(self.model, runner, max_full_rows)


def check_batch_invariant(model: Model) -> None:
    """Raises ValueError where a model's products can depend on the rows beside a row."""
    if model.device.type == "cpu":
        return
    weights, layer = model.weights, model.weights.layers[0]
    for matrix in (layer.qkv, layer.attention_out, layer.gate_up, layer.down, weights.head):
        x, out = (matrix.new_zeros(1, size) for size in reversed(matrix.shape))
        try:
            ops.linear(x, matrix.t(), None, out, True)
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                "batch_invariant must be False here: on a GPU it takes bfloat16, compute "
                "capability 9.0, sizes that are multiples of 64 and a head of its own, and "
                f"{model.name} is {str(model.dtype).removeprefix('torch.')} on {model.device} with "
                f"a matrix of {matrix.shape[0]} x {matrix.shape[1]}"
            ) from error


def batch_shape(model: Model, num_lanes: int, capacity: int) -> RunnerShape:
    """The runner that requests of any window policy share."""
    return RunnerShape(
        num_sequences=num_lanes,
        capacity=capacity_for(capacity, model),
        needs=CacheNeeds(keys_values=True, queries=True, inputs=True),
        num_candidates=MAX_BATCH_WINDOW,
        track_num=1,
        num_chosen=MAX_BATCH_ROWS,
        selects_rows=True,
        tests_drift=True,
        rolling=RollingPolicy.rolling,
        has_noise=True,
        eos_id=model.config.eos_id,
    )


def runner_shape(
    model: Model, policy: Policy, settings: GenerationConfig, length: int
) -> RunnerShape:
    """The runner that a request for a sequence of `length` positions needs."""
    return RunnerShape(
        num_sequences=1,
        capacity=capacity_for(length, model),
        needs=policy.needs,
        num_candidates=policy.num_candidates,
        track_num=settings.track_num if policy.tests_drift else 0,
        num_chosen=policy.num_rows,
        selects_rows=policy.window > 0,
        tests_drift=policy.tests_drift,
        rolling=policy.rolling,
        has_noise=settings.temperature > 0,
        eos_id=model.config.eos_id if policy.drops_tail_at_eos else -1,
    )


class RunnerPool:
    """Idle runners, most recently used last."""

    def __init__(self, model: Model, capture: bool, batch_invariant: bool) -> None:
        self._model = model
        self._batch_invariant = batch_invariant
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
        return Runner(self._model, shape, self._capture_stream, self._batch_invariant)

    def give(self, runner: Runner) -> None:
        """Keeps a runner that has finished its request."""
        self._idle = [*self._idle, runner][-_MAX_IDLE_RUNNERS:]
