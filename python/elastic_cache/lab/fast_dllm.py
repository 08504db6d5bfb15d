"""Fast-dLLM (arXiv 2505.22618) on the weights of an elastic_cache model, to time both in one run.

Its code is imported from a checkout of github.com/NVlabs/Fast-dLLM at COMMIT, is not edited, and
needs `transformers` (4.49 and 5.17 were tried) and `einops`. The subtle things:

    - Its model class makes 8B parameters in float32 on the CPU, and from_pretrained wants files on
      disk. Here the network is made without storage and is then given views of our tensors.
    - Its constructor switches torch's memory-efficient attention off for the whole process. Here
      that holds while its code runs and no longer, or it would change what it is compared with.
    - Its attention goes through torch.compile, once per kind of shape: warm-up steps pay for that.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from elastic_cache.config import ModelConfig
from elastic_cache.models import llada
from elastic_cache.models.weights import ModelWeights

COMMIT = "24cc59e75f20a6384bae8c905965bb090b96388e"
FILES = ("llada/generate.py", "llada/model/modeling_llada.py", "llada/model/configuration_llada.py")


class PeerError(ValueError):
    """The other project cannot be run as asked; the sentence says why."""


@dataclass(frozen=True)
class Checkout:
    """The modules of a checkout: `generate` decodes, `modeling` and `settings` are the model."""

    generate: ModuleType
    modeling: ModuleType
    settings: ModuleType


@dataclass(frozen=True)
class Block:
    """A block to decode: what its inner loop holds when a step begins."""

    x: Tensor  # [1, length] the sequence; its positions begin .. end are the block
    begin: int
    end: int
    masked: Tensor  # [1, end - begin] tokens of the block before a step
    keys_values: Any  # of a full forward; a step overwrites its own rows
    replaced: Tensor  # [1, length] bool, true at the block


class FastDLLM:
    """Its LLaDA model on our weights, which it reads where they lie (no copy).

    Args:
        checkout: folder of the repository; see COMMIT.
        config: shape of the model.
        weights: its tensors, all on `device`.
        device: where it runs.
    """

    def __init__(
        self, checkout: Path, config: ModelConfig, weights: ModelWeights, device: torch.device
    ) -> None:
        if config.head_dim * config.num_heads != config.hidden_size:
            raise PeerError(
                "Fast-dLLM's model has hidden_size = num_heads * head_dim, got "
                f"{config.hidden_size}, {config.num_heads} and {config.head_dim}"
            )
        place = weights.embedding.device
        if place.type != device.type or device.index not in (None, place.index):
            raise PeerError(f"device must be where the weights are, {place}, got {device}")
        self.checkout = load_checkout(Path(checkout))
        self.config, self.device = config, place
        before = torch.backends.cuda.mem_efficient_sdp_enabled()
        self.model = _build(self.checkout, config)
        torch.backends.cuda.enable_mem_efficient_sdp(before)
        self.model.load_state_dict(
            dict(llada.named_tensors(config, weights)), strict=True, assign=True
        )
        self.model.requires_grad_(False).eval()

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """A full forward without a cache: ids [n] -> [n, vocab_size]."""
        with _its_attention():
            logits: Tensor = self.model(ids[None].to(self.device)).logits[0]
        return logits

    @torch.no_grad()
    def generate(
        self, prompt: Tensor, mode: str, gen_length: int, block_length: int, threshold: float
    ) -> tuple[Tensor, int, float]:
        """Its own decoding of one prompt at temperature 0, by its threshold rule.

        Args:
            prompt: int64 [P] on the CPU.
            mode: "none" (no cache), "prefix" or "dual".
            gen_length: masks after the prompt, a multiple of `block_length`.
            block_length: of its blocks.
            threshold: confidence from which a token is committed; the best one always is.

        Returns:
            ids int64 [P + gen_length] on the CPU, its number of forwards, and the seconds from
            the prompt on the CPU to the ids there.
        """
        its = self.checkout.generate
        decode = {
            "none": its.generate,
            "prefix": its.generate_with_prefix_cache,
            "dual": its.generate_with_dual_cache,
        }[mode]
        with _its_attention():
            begin = time.perf_counter()
            ids, nfe = decode(
                self.model,
                prompt[None].to(self.device),
                steps=gen_length,  # by its rule a bound that is not reached
                gen_length=gen_length,
                block_length=block_length,
                mask_id=self.config.mask_id,
                threshold=threshold,
            )
            ids = ids[0].cpu()
            seconds = time.perf_counter() - begin
        return ids, nfe, seconds

    @torch.no_grad()
    def time_block_step(
        self,
        length: int,
        block_length: int = 32,
        steps: int = 20,
        warmup: int = 5,
        threshold: float = 0.9,
        num_masked: int | None = None,
    ) -> list[float]:
        """Milliseconds of each of `steps` steps of its dual-cache decoding, at temperature 0.

        A step is one turn of the inner loop: the forward of the block over the cache of a full
        forward, its choice of tokens by threshold, the commit and the test whether the block is
        done. The clock is the host's, between synchronisations, since the step reads values back.

        Args:
            length: positions of the whole sequence; its last `block_length` are the block.
            block_length: rows of a step.
            steps: timed steps.
            warmup: steps before those, not timed.
            threshold: confidence from which a token is committed.
            num_masked: masked positions of the block at the start of every step, all of them by
                default. Its choice of tokens visits them one by one from the host.
        """
        masked = block_length if num_masked is None else num_masked
        self._check(length, block_length, masked)
        times = []
        with _its_attention():
            block = self._fill(length, block_length, masked)
            for _ in range(warmup + steps):
                block.x[:, block.begin : block.end] = block.masked
                self._synchronise()
                begin = time.perf_counter()
                self._step(block, threshold)
                self._synchronise()
                times.append(1e3 * (time.perf_counter() - begin))
        return times[warmup:]

    def _check(self, length: int, block_length: int, masked: int) -> None:
        if not 1 <= block_length <= length <= self.config.max_length:
            raise PeerError(
                "1 <= block_length <= length <= max_length must hold, got "
                f"{block_length}, {length} and {self.config.max_length}"
            )
        if not 1 <= masked <= block_length:
            raise PeerError(
                f"num_masked must be between 1 and block_length = {block_length}, got {masked}"
            )

    def _fill(self, length: int, block_length: int, num_masked: int) -> Block:
        """Random tokens, masks at the end, and the cache of a full forward over them."""
        rng = torch.Generator().manual_seed(0)
        mask, vocab = self.config.mask_id, self.config.vocab_size
        x = torch.randint(vocab - 1, (1, length), generator=rng)
        x += x >= mask  # any token but the mask
        x[:, length - num_masked :] = mask
        x = x.to(self.device)
        begin = length - block_length
        replaced = torch.zeros_like(x, dtype=torch.bool)
        replaced[:, begin:] = True
        cache = self.model(x, use_cache=True).past_key_values
        return Block(x, begin, length, x[:, begin:].clone(), cache, replaced)

    def _step(self, block: Block, threshold: float) -> bool:
        """One turn of its inner loop; returns whether the block is done."""
        rows, mask = block.x[:, block.begin : block.end], self.config.mask_id
        is_masked = rows == mask
        output = self.model(
            rows,
            past_key_values=block.keys_values,
            use_cache=True,
            replace_position=block.replaced,
        )
        tokens, chosen = self.checkout.generate.get_transfer_index(
            output.logits, 0.0, "low_confidence", is_masked, rows, None, threshold
        )
        rows[chosen] = tokens[chosen]
        return bool((rows == mask).sum() == 0)

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextmanager
def _its_attention() -> Iterator[None]:
    """torch's attention kernels as its constructor chooses them."""
    cuda = torch.backends.cuda
    before = (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled())
    cuda.enable_flash_sdp(True)
    cuda.enable_mem_efficient_sdp(False)
    try:
        yield
    finally:
        cuda.enable_flash_sdp(before[0])
        cuda.enable_mem_efficient_sdp(before[1])


def load_checkout(folder: Path) -> Checkout:
    """Imports the code of a checkout, once per process.

    Raises:
        PeerError: the folder is not a checkout, or a package that its code needs is missing.
    """
    advice = "git clone https://github.com/NVlabs/Fast-dLLM, then in it git checkout " + COMMIT[:12]
    if not folder.is_dir():
        raise PeerError(f"the checkout of Fast-dLLM must be a folder, got {folder}: {advice}")
    for file in FILES:
        if not (folder / file).is_file():
            raise PeerError(f"{folder} is no checkout of Fast-dLLM: it lacks {file}: {advice}")
    missing = [name for name in ("transformers", "einops") if find_spec(name) is None]
    if missing:
        raise PeerError(f"Fast-dLLM needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    return _import_checkout(folder.resolve())


@functools.cache
def _import_checkout(folder: Path) -> Checkout:
    """Its files import one another as `model`, a name that another project may have as well."""
    home = folder / "llada"
    before = sys.modules.get("model")
    if before is not None and not _lies_in(before, home):
        raise PeerError(
            f"a module named model is imported already, from {before.__file__}, and Fast-dLLM's "
            f"in {home} has the same name: use one of them per process"
        )
    sys.path.insert(0, str(home))
    try:
        modeling = import_module("model.modeling_llada")
        settings = import_module("model.configuration_llada")
        spec = spec_from_file_location("fast_dllm_generate", home / "generate.py")
        assert spec is not None and spec.loader is not None  # the file ends in .py
        generate = module_from_spec(spec)
        spec.loader.exec_module(generate)
    finally:
        sys.path.remove(str(home))
    return Checkout(generate, modeling, settings)


def _lies_in(module: ModuleType, folder: Path) -> bool:
    file = module.__file__
    return file is not None and folder in Path(file).resolve().parents


def _build(checkout: Checkout, config: ModelConfig) -> Any:
    """Its model at our shape, parameters without storage; the other settings are LLaDA-8B's."""
    settings = dict(
        **llada.config_fields(config),
        pad_token_id=config.eos_id,
        rope=True,
        rope_full_precision=True,
        layer_norm_type="rms",
        activation_type="silu",
        block_type="llama",
        include_bias=False,
        attention_dropout=0.0,
        embedding_dropout=0.0,
        residual_dropout=0.0,
    )
    modeling = checkout.modeling
    shape = checkout.settings.ModelConfig(**settings, init_device="meta")
    network = modeling.LLaDAModel(shape, init_params=False)
    outer = checkout.settings.LLaDAConfig(**settings)
    outer.use_cache = False  # its forward reads it, and transformers 5 drops it from a config
    return modeling.LLaDAModelLM(outer, model=network)
