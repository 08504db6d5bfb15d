"""What a model is and what a request asks for: frozen dataclasses that refuse wrong values.

Every error is a ValueError whose sentence names the argument, the rule and what was given.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

POLICIES = ("none", "prefix", "dual", "elastic", "rolling")

MAX_FULL_ROWS = 512
"""Of a step of several requests, through all layers: a full pass of 350 positions takes as long as
one and a half window passes of LLaDA-8B."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape and special ids of a masked-diffusion language model.

    Sizes are counts of elements; `max_length` is in tokens (prompt and answer together).
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_length: int
    rope_theta: float
    rms_norm_eps: float
    mask_id: int
    eos_id: int
    tie_embeddings: bool = False
    has_qkv_bias: bool = False

    @property
    def num_parameters(self) -> int:
        d, f = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        bias = (q + 2 * kv) if self.has_qkv_bias else 0
        layer = 2 * d + d * (q + 2 * kv) + bias + q * d + 3 * d * f
        tables = self.vocab_size * d * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + tables + d


@dataclass(frozen=True)
class GenerationConfig:
    """What one request asks for; see `Engine.generate` for the meaning of every field."""

    gen_length: int = 512
    policy: str = "elastic"
    window: int = 16
    gamma: float = 0.9
    threshold: float = 0.9
    track_num: int = 1
    block_caching: bool = True
    block_length: int = 32
    num_rows: int = 96
    tokens_per_step: int | None = None
    steps: int | None = None
    factor: float | None = None
    temperature: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {self.policy!r}")
        _whole("gen_length", self.gen_length, least=0)
        for name in ("window", "track_num", "block_length", "num_rows"):
            _whole(name, getattr(self, name), least=1)
        for name in ("tokens_per_step", "steps"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), least=1)
        if not isinstance(self.block_caching, bool):
            raise ValueError(f"block_caching must be True or False, got {self.block_caching!r}")
        _number("gamma", self.gamma)
        _number("threshold", self.threshold, least=0.0, most=1.0)
        _number("temperature", self.temperature, least=0.0)
        if math.isinf(self.temperature):
            raise ValueError(f"temperature must be finite, got {self.temperature}")
        if self.factor is not None:
            _number("factor", self.factor, least=0.0)
        if self.seed is not None:
            _whole("seed", self.seed, least=0)
        given = [n for n in ("tokens_per_step", "steps", "factor") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are different commit rules: give one of them")
        if self.policy == "rolling" and self.num_rows < self.window:
            raise ValueError(
                f"num_rows must be at least the window of {self.window}, got {self.num_rows}"
            )
        if self.policy == "rolling" and not self.block_caching:
            raise ValueError(
                "block_caching=False works with policy elastic only; rolling refreshes the masked "
                "positions outside the window as it does all others"
            )
        if self.steps is not None and self.policy not in ("prefix", "dual"):
            raise ValueError(
                "steps (Fast-dLLM's fixed number of steps) works with policy prefix or dual only; "
                f"with policy {self.policy} use tokens_per_step"
            )


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _number(name: str, value: object, least: float = -math.inf, most: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not least <= value <= most:
        bound = f"at least {least:g}" if most == math.inf else f"between {least:g} and {most:g}"
        raise ValueError(f"{name} must be {bound}, got {value!r}")


def find_settings(given: dict[str, Any]) -> GenerationConfig:
    """The settings of those names, checked; ValueError with the name or value that is wrong."""
    known = [field.name for field in dataclasses.fields(GenerationConfig)]
    for name in given:
        if name not in known:
            raise ValueError(f"there is no setting {name!r}: {hint(name, known)}")
    return GenerationConfig(**given)


def hint(name: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """What a user who wrote `name` may have meant; if nothing is close `otherwise`, or all that is
    known."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"known are {', '.join(names)}" if otherwise is None else otherwise
