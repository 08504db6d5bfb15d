"""What a run compares: cells, each a policy with its settings or another project's decoder.

A cell is written `policy[:setting=value]...`: `elastic:gamma=0.95`, `fast-dllm:mode=dual`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from elastic_cache.config import GenerationConfig, hint

FAST_DLLM = "fast-dllm"
MODES = ("none", "prefix", "dual")


@dataclass(frozen=True)
class PeerSettings:
    """How Fast-dLLM decodes: its cache, and its threshold rule inside blocks."""

    mode: str = "dual"
    gen_length: int = 512
    block_length: int = 32
    threshold: float = 0.9

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode of {FAST_DLLM} must be one of {', '.join(MODES)}, "
                             f"got {self.mode!r}")  # fmt: skip
        for name in ("gen_length", "block_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.gen_length % self.block_length:
            raise ValueError(
                f"{FAST_DLLM} needs a gen_length that is a multiple of block_length, got "
                f"{self.gen_length} and {self.block_length}"
            )
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be between 0 and 1, got {self.threshold}")


@dataclass(frozen=True)
class Cell:
    """One arm of a comparison; `name` is how it was asked for."""

    name: str
    settings: GenerationConfig | PeerSettings

    @property
    def is_peer(self) -> bool:
        return isinstance(self.settings, PeerSettings)

    @property
    def policy(self) -> str:
        """What its pictures are grouped by."""
        return FAST_DLLM if isinstance(self.settings, PeerSettings) else self.settings.policy

    def full_recompute(self) -> GenerationConfig | PeerSettings:
        """The same request with every position recomputed in every step, if there is one.

        For `prefix` and `dual`, whose blocks no other policy has, it is policy `none` with the
        same commit rule; for Fast-dLLM its own decoder without a cache.
        """
        if isinstance(self.settings, PeerSettings):
            return dataclasses.replace(self.settings, mode="none")
        full = GenerationConfig(policy="none")
        shared = ("gen_length", "window", "threshold", "tokens_per_step", "factor", "temperature",
                  "seed")  # fmt: skip
        return dataclasses.replace(full, **{name: getattr(self.settings, name) for name in shared})


def read_cells(text: str, given: dict[str, Any]) -> list[Cell]:
    """The cells of a comma-separated list; `given` are the settings that all of them have.

    Raises:
        ValueError: a sentence that names the cell and what is wrong with it.
    """
    names = [name.strip() for name in text.split(",")]
    if len(set(names)) < len(names):
        raise ValueError(f"policies must name each cell once, got {text!r}")
    return [_read_cell(name, given) for name in names]


def _read_cell(name: str, given: dict[str, Any]) -> Cell:
    policy, *parts = name.split(":")
    kind = PeerSettings if policy == FAST_DLLM else GenerationConfig
    values = {"policy": policy, **given} if kind is GenerationConfig else dict(given)
    types = get_type_hints(kind)
    for part in parts:
        setting, is_assigned, value = part.partition("=")
        if not is_assigned:
            raise ValueError(f"{name!r}: after a colon comes setting=value, got {part!r}")
        if setting not in types or setting == "policy":
            raise ValueError(
                f"{name!r}: {policy} has no setting {setting!r}: {hint(setting, types)}"
            )
        values[setting] = _value(name, setting, value, types[setting])
    known = {setting: value for setting, value in values.items() if setting in types}
    return Cell(name, kind(**known))


def _value(name: str, setting: str, text: str, kind: Any) -> Any:
    if kind is str:
        return text
    if kind is bool:
        if text not in ("True", "False"):
            raise ValueError(f"{name!r}: {setting} must be True or False, got {text!r}")
        return text == "True"
    wanted = int if int in (kind, *get_args(kind)) else float
    try:
        return wanted(text)
    except ValueError:
        what = "a whole number" if wanted is int else "a number"
        raise ValueError(f"{name!r}: {setting} must be {what}, got {text!r}") from None
