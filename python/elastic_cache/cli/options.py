"""Options that commands share: the model, and every generation setting under its own name."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from typing import Any

from elastic_cache.config import POLICIES, GenerationConfig, hint

# setting -> (type, metavar, help); the defaults are GenerationConfig's.
_SETTINGS: dict[str, tuple[type, str, str]] = {
    "gen_length": (int, "N", "length of the answer in tokens"),
    "window": (int, "N", "leftmost masked positions decoded per step (none, elastic, rolling)"),
    "gamma": (float, "X", "drift threshold: a mean cosine below it refreshes (elastic)"),
    "threshold": (float, "P", "confidence from which a token is committed"),
    "track_num": (int, "N", "tracked tokens per layer (elastic)"),
    "block_length": (int, "N", "block size (prefix, dual)"),
    "num_rows": (int, "N", "rows computed per step (rolling)"),
    "tokens_per_step": (int, "N", "commit exactly this many tokens a step instead"),
    "steps": (int, "N", "fixed number of steps instead (prefix, dual)"),
    "factor": (float, "X", "Fast-dLLM's factor rule instead"),
    "temperature": (float, "T", "0 takes the most likely token, above 0 samples"),
    "seed": (int, "N", "makes sampling repeatable"),
}


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="tiny",
        metavar="NAME",
        help="tiny (the embedded model, default), a checkpoint folder, or a hub id",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--dtype", default="float32", help="float32 (default) or bfloat16")


def add_batch_invariant(parser: argparse._ActionsContainer) -> None:
    """For commands that answer many requests at once."""
    parser.add_argument(
        "--batch-invariant",
        action="store_true",
        help="on a GPU, too, every bit of an answer is the same whoever is answered beside it",
    )


def add_settings(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Every generation setting but the policy; `defaults` replaces some default values."""
    group = parser.add_argument_group("generation settings")
    for name, (kind, metavar, text) in _SETTINGS.items():
        default = defaults.get(name, getattr(GenerationConfig, name))
        shown = "" if default is None else f" (default {default})"
        group.add_argument(
            _flag(name), type=kind, default=default, metavar=metavar, help=text + shown
        )
    group.add_argument(
        "--no-block-caching",
        dest="block_caching",
        action="store_false",
        help="compute every masked position in every step, not only the window's (elastic)",
    )


def add_policy(parser: argparse.ArgumentParser) -> None:
    # No `choices`: GenerationConfig refuses an unknown name in its own words, here as in Python.
    parser.add_argument(
        "--policy",
        default=GenerationConfig.policy,
        metavar="NAME",
        help=f"{', '.join(POLICIES)} (default {GenerationConfig.policy})",
    )


def read_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings given on the command line, without the policy."""
    return {name: getattr(options, name) for name in (*_SETTINGS, "block_caching")}


def read_request(options: argparse.Namespace) -> dict[str, Any]:
    """The settings and the policy given on the command line, checked before a model is loaded.

    Raises:
        ValueError: a sentence naming the argument and the rule it breaks.
    """
    settings = {"policy": options.policy, **read_settings(options)}
    GenerationConfig(**settings)
    return settings


def read_assignments(words: Sequence[str]) -> dict[str, Any]:
    """Settings written as `name=value`; "none" takes back one that need not be set.

    Raises:
        ValueError: a sentence with the word and what is wrong with it.
    """
    given = {}
    for word in words:
        name, is_assigned, text = word.partition("=")
        if not is_assigned:
            raise ValueError(f"a setting is written name=value, got {word!r}")
        known = [*_SETTINGS, "block_caching"]
        if name not in known:
            raise ValueError(f"there is no setting {name!r}: {hint(name, known)}")
        given[name] = _read_value(name, text)
    return given


def _read_value(name: str, text: str) -> Any:
    if name == "block_caching":
        if text.lower() not in ("true", "false"):
            raise ValueError(f"block_caching must be true or false, got {text!r}")
        return text.lower() == "true"
    if text.lower() == "none" and getattr(GenerationConfig, name) is None:
        return None
    kind = _SETTINGS[name][0]
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} must be {what}, got {text!r}") from None


def write_json(value: Any, indent: int | None = 2) -> str:
    """JSON text; numbers that JSON lacks (gamma may be infinite) become strings."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
