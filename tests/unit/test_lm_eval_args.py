"""The harness's arguments, in this package's names and in llada_dist's: settings or a sentence."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from elastic_cache.config import GenerationConfig
from elastic_cache.lm_eval_args import read_arguments, request_settings, stop_strings


def settings(**given: Any) -> dict[str, Any]:
    return read_arguments(given).settings


def refused(**given: Any) -> str:
    with pytest.raises(ValueError) as caught:
        read_arguments(given)
    return str(caught.value)


@pytest.mark.parametrize("name", ["model", "pretrained", "model_path"])
def test_the_model_has_three_names(name: str) -> None:
    assert read_arguments({name: "folder"}).model == "folder"


def test_own_names_are_passed_on() -> None:
    defaults = dataclasses.asdict(GenerationConfig())
    given = {name: value for name, value in defaults.items() if value is not None}
    given.update(policy="dual", window=8, gamma=0.5, temperature=0.7, seed=3)
    assert len(given) > 10 and settings(model="tiny", **given) == given
    for rule in (dict(tokens_per_step=2), dict(factor=1.5), dict(steps=8, policy="dual")):
        assert settings(model="tiny", **rule) == rule


def test_other_own_names() -> None:
    given = dict(model="tiny", device="cuda:1", dtype="bfloat16", max_length=100, show_speed=True)
    read = read_arguments(given)
    assert (read.device, read.dtype, read.max_length) == ("cuda:1", "bfloat16", 100)
    assert read.show_speed and read.mask_id is None and read.settings == {}


FAST_DLLM = dict(model_path="m", gen_length=256, block_length=32, show_speed=True)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # The rows of Fast-dLLM's evaluation script.
        (dict(steps=256), dict(policy="none", window=32, tokens_per_step=1)),
        (dict(steps=64, use_cache=False), dict(policy="none", window=32, tokens_per_step=4)),
        (dict(steps=256, use_cache=True), dict(policy="prefix", steps=256)),
        (dict(steps=8, threshold=0.9), dict(policy="none", window=32, threshold=0.9)),
        (dict(steps=8, threshold=0.9, use_cache=True), dict(policy="prefix", threshold=0.9)),
        (
            dict(steps=8, threshold=0.9, use_cache=True, dual_cache=True),
            dict(policy="dual", threshold=0.9),
        ),
        (dict(steps=8, factor=1.0, use_cache=True), dict(policy="prefix", factor=1.0)),
        # Mixed with this package's names.
        (dict(policy="elastic", threshold=0.9), dict(policy="elastic", threshold=0.9)),
        (dict(policy="elastic", use_cache=False), dict(policy="elastic")),
        (dict(window=16, threshold=0.9), dict(policy="none", window=16, threshold=0.9)),
    ],
)
def test_spelling_of_llada_dist(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert settings(**FAST_DLLM, **given) == {"gen_length": 256, "block_length": 32, **expected}


def test_use_cache_marks_llada_dist_as_model_path_does() -> None:
    common = dict(model="m", steps=8, threshold=0.9)
    assert settings(**common, use_cache=True) == {"policy": "prefix", "threshold": 0.9}
    assert settings(**common, policy="dual")["steps"] == 8  # as Engine.generate: steps decides


def test_what_changes_nothing_is_ignored() -> None:
    ignored = dict(
        mc_num=128,
        is_check_greedy=False,
        batch_size="1",
        max_batch_size=64,
        trust_remote_code=True,
        cfg=0.0,
        cfg_scale=0,
        remasking="low_confidence",
        threshold=None,
    )
    assert read_arguments({"model": "tiny", **ignored}) == read_arguments({"model": "tiny"})
    assert read_arguments({"model": "tiny", "batch_size": "auto:4"}).settings == {}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "model=tiny"),
        (dict(model="a", pretrained="b"), "model and pretrained"),
        (dict(model="a", treshold=0.9), "did you mean threshold?"),
        (dict(model="a", quux=1), "known are model"),
        (dict(model="a", cfg=0.5), "cfg must be 0, got 0.5"),
        (dict(model="a", cfg_scale=1), "cfg_scale must be 0, got 1"),
        (dict(model="a", remasking="random"), "low_confidence, got 'random'"),
        (dict(model="a", save_dir="out"), "--use_cache PATH"),
        (dict(model="a", batch_size=8), "batch_size must be 1, got 8"),
        (dict(model="a", use_cache="yes"), "use_cache must be True or False, got 'yes'"),
        (dict(model="a", show_speed=1), "show_speed must be True or False, got 1"),
        (dict(model="a", dual_cache=True), "dual_cache=True needs use_cache=True"),
        (dict(model="a", gamma="high"), "gamma must be a number"),
        (dict(model="a", policy="fast"), "policy must be one of"),
        (dict(model="a", steps=4), "steps"),
        (dict(model_path="a", steps=4), "steps 4 and gen_length None"),
        (dict(model_path="a", steps=7, gen_length=64), "steps 7 and gen_length 64"),
        (dict(model_path="a", steps=0, gen_length=64), "steps 0 and gen_length 64"),
    ],
)
def test_refused_in_a_sentence(given: dict[str, Any], words: str) -> None:
    assert words in refused(**given)


def test_model_args_come_before_the_task() -> None:
    asked = {"max_gen_toks": 32, "do_sample": True, "temperature": 0.7}
    assert request_settings({}, asked) == {"gen_length": 32, "temperature": 0.7}
    given = {"gen_length": 64, "temperature": 0.0, "window": 8}
    assert request_settings(given, asked) == given


@pytest.mark.parametrize(
    ("asked", "temperature"),
    [
        ({}, 0.0),
        ({"do_sample": False, "temperature": 0.7}, 0.0),
        ({"do_sample": True}, 0.0),
        ({"temperature": 0.7}, 0.7),
    ],
)
def test_temperature_of_the_task(asked: dict[str, Any], temperature: float) -> None:
    assert request_settings({}, asked) == {"temperature": temperature}


def test_sampling_limits_of_the_task() -> None:
    greedy = {"top_p": 0.95, "top_k": 5, "num_beams": 1, "do_sample": False}
    assert request_settings({}, greedy) == {"temperature": 0.0}
    with pytest.raises(ValueError, match=r"top_p=0.95.*temperature=0 in model_args"):
        request_settings({}, {"top_p": 0.95, "temperature": 0.2})
    with pytest.raises(ValueError, match=r"num_beams=10, which is not implemented$"):
        request_settings({}, {"num_beams": 10})
    with pytest.raises(ValueError, match=r"window=8.*give window in --model_args"):
        request_settings({}, {"window": 8})


def test_stop_strings() -> None:
    assert stop_strings({"until": "\n"}) == ["\n"]
    assert stop_strings({"until": ["\n\n", "", "Q:"]}) == ["\n\n", "Q:"]
    assert stop_strings({"until": None}) == stop_strings({}) == []
