"""`model_args` and `generation_kwargs` of the lm-evaluation-harness -> settings of requests.

The names of this package and of `llada_dist`, the model that LLaDA and Fast-dLLM bring for the
harness, are taken alike. The subtle thing: `steps`, `threshold` and `block_length` are in both,
and do not mean the same; see `read_arguments`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from elastic_cache.config import GenerationConfig, hint

_MODEL_NAMES = ("model", "pretrained", "model_path")
_LLADA_DIST_MARKS = ("model_path", "use_cache", "dual_cache")
_SETTINGS = tuple(field.name for field in dataclasses.fields(GenerationConfig))
_OTHERS = ("device", "dtype", "show_speed", "use_cache", "dual_cache", "max_length", "mask_id")
_ONE_VALUE_ONLY = ("batch_size", "cfg", "cfg_scale", "remasking", "save_dir")
_WITHOUT_EFFECT = ("mc_num", "is_check_greedy", "max_batch_size", "trust_remote_code")
"""The first two are about likelihoods; no code of a checkpoint is ever run."""
_KNOWN = (*_MODEL_NAMES, *_SETTINGS, *_OTHERS, *_ONE_VALUE_ONLY, *_WITHOUT_EFFECT)

_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks and harness versions call the length of an answer, in the harness's order."""

_GREEDY_IGNORES = ("top_p", "top_k")
"""Sampling limits: without effect where the most likely token is taken."""


@dataclass(frozen=True)
class Arguments:
    """What `model_args` said, in this package's words.

    Attributes:
        model: as `elastic_cache.load` takes it.
        settings: fields of GenerationConfig that were given; requests may fill in others.
        device: None means the GPU if it can be used, else the CPU.
        dtype: None means bfloat16 on a GPU and float32 on the CPU.
        max_length: tokens of prompt and answer together; None means the model's own limit.
        mask_id: what the mask id is expected to be, None if nothing was said.
        show_speed: print tokens per second, tokens per forward and forwards after the last answer.
    """

    model: str
    settings: dict[str, Any]
    device: str | None = None
    dtype: str | None = None
    max_length: int | None = None
    mask_id: int | None = None
    show_speed: bool = False


def read_arguments(given: Mapping[str, Any]) -> Arguments:
    """Translates `model_args`; a value of None counts as not given.

    `model_path`, `use_cache` or `dual_cache` mark the spelling of `llada_dist`. Then, as there:
    no `use_cache` means no cache (policy none); `steps` is dropped where `threshold` or `factor`
    decides what is committed. Without a cache this package decodes in a sliding window, so
    `block_length` becomes `window` and `steps` becomes `tokens_per_step`: as many candidates and
    commits per step as there, but no block borders. `policy` comes before `use_cache` and
    `dual_cache`. What nobody gave has this package's default.

    Raises:
        ValueError: a name that does not exist, a value that cannot be honoured, or contradictory
            arguments, in a sentence.
    """
    rest = {name: value for name, value in given.items() if value is not None}
    for name in rest:
        _check_name(name)
    _refuse_unsupported(rest)
    models = [name for name in _MODEL_NAMES if name in rest]
    if not models:
        raise ValueError("which model? Give model=tiny, a checkpoint folder or a hub id")
    if len(models) > 1:
        raise ValueError(f"{' and '.join(models)} all name the model: give one of them")
    settings = {name: rest[name] for name in _SETTINGS if name in rest}
    has_cache, is_dual = _flag(rest, "use_cache"), _flag(rest, "dual_cache")
    if any(name in rest for name in _LLADA_DIST_MARKS):
        settings = _from_llada_dist(settings, has_cache, is_dual)
    GenerationConfig(**settings)
    return Arguments(
        model=str(rest[models[0]]),
        settings=settings,
        device=None if "device" not in rest else str(rest["device"]),
        dtype=rest.get("dtype"),
        max_length=rest.get("max_length"),
        mask_id=rest.get("mask_id"),
        show_speed=_flag(rest, "show_speed"),
    )


def _check_name(name: str) -> None:
    if name in _KNOWN:
        return
    known = hint(name, _KNOWN)
    raise ValueError(f"model_args has {name!r}, which is no argument of this model: {known}")


def _refuse_unsupported(given: Mapping[str, Any]) -> None:
    for name in ("cfg", "cfg_scale"):
        if given.get(name, 0) != 0:
            raise ValueError(
                f"{name} must be 0, got {given[name]!r}: there is no classifier-free guidance"
            )
    if given.get("remasking", "low_confidence") != "low_confidence":
        raise ValueError(
            f"remasking must be low_confidence, got {given['remasking']!r}: the most confident "
            "tokens are committed and the others stay masked"
        )
    if "save_dir" in given:
        raise ValueError(
            "save_dir is not implemented: the harness's own --use_cache PATH keeps the answers and "
            "resumes from them"
        )
    size = str(given.get("batch_size", 1))
    if size != "1" and not size.startswith("auto"):
        raise ValueError(f"batch_size must be 1, got {size}: requests are answered one at a time")


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def _from_llada_dist(settings: dict[str, Any], has_cache: bool, is_dual: bool) -> dict[str, Any]:
    """The settings as `read_arguments` says for the spelling of `llada_dist`."""
    settings = dict(settings)
    if "threshold" in settings or "factor" in settings:
        settings.pop("steps", None)
    if "policy" in settings:
        return settings
    if is_dual and not has_cache:
        raise ValueError("dual_cache=True needs use_cache=True")
    settings["policy"] = ("dual" if is_dual else "prefix") if has_cache else "none"
    if has_cache:
        return settings
    if "block_length" in settings:
        settings.setdefault("window", settings["block_length"])
    steps = settings.pop("steps", None)
    if steps is not None:
        settings["tokens_per_step"] = _tokens_per_step(steps, settings.get("gen_length"))
    return settings


def _tokens_per_step(steps: object, gen_length: object) -> int:
    """Commits per step of an answer that takes that many steps."""
    if isinstance(steps, int) and isinstance(gen_length, int) and steps > 0:
        if gen_length % steps == 0:
            return gen_length // steps
    raise ValueError(
        "without a cache steps must divide gen_length, and both must be given: "
        f"got steps {steps!r} and gen_length {gen_length!r}"
    )


def request_settings(given: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of one request: `model_args` first, then what the task asks for.

    Args:
        given: `Arguments.settings`.
        asked: the request's generation_kwargs.

    Raises:
        ValueError: the task asks for what would change the answers and is not implemented.
    """
    settings = dict(given)
    lengths = [asked[name] for name in _LENGTH_NAMES if asked.get(name) is not None]
    if lengths:
        settings.setdefault("gen_length", lengths[0])
    is_sampled = asked.get("do_sample", True) and asked.get("temperature")
    settings.setdefault("temperature", asked["temperature"] if is_sampled else 0.0)
    for name, value in asked.items():
        if name in ("until", "do_sample", "temperature", *_LENGTH_NAMES):
            continue
        is_greedy = settings["temperature"] == 0
        if (name in _GREEDY_IGNORES and is_greedy) or (name == "num_beams" and value == 1):
            continue
        raise ValueError(
            f"generation_kwargs has {name}={value!r}, which is not implemented"
            + ("; with temperature=0 in model_args it has no effect" * (name in _GREEDY_IGNORES))
            + (f"; give {name} in --model_args" * (name in _SETTINGS))
        )
    return settings


def stop_strings(asked: Mapping[str, Any]) -> list[str]:
    """The stop strings of a request's generation_kwargs; an empty one would stop at once."""
    until = asked.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop]
