"""Settings refuse what they cannot honour, in a sentence that names the argument and the rule."""

from __future__ import annotations

import math

import pytest
from elastic_cache.config import GenerationConfig, ModelConfig

BAD = [
    (
        {"policy": "magic"},
        "policy must be one of none, prefix, dual, elastic, rolling, got 'magic'",
    ),
    ({"window": 0}, "window must be at least 1, got 0"),
    ({"window": 2.5}, "window must be a whole number, got 2.5"),
    ({"window": True}, "window must be a whole number, got True"),
    ({"gen_length": -1}, "gen_length must be at least 0, got -1"),
    ({"gen_length": "8"}, "gen_length must be a whole number, got '8'"),
    ({"track_num": 0}, "track_num must be at least 1, got 0"),
    ({"block_length": 0}, "block_length must be at least 1, got 0"),
    ({"gamma": math.nan}, "gamma must be a number, got nan"),
    ({"gamma": None}, "gamma must be a number, got None"),
    ({"threshold": math.nan}, "threshold must be a number, got nan"),
    ({"threshold": 1.5}, "threshold must be between 0 and 1, got 1.5"),
    ({"threshold": -0.1}, "threshold must be between 0 and 1, got -0.1"),
    ({"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
    ({"temperature": math.inf}, "temperature must be finite, got inf"),
    ({"factor": math.nan}, "factor must be a number, got nan"),
    ({"tokens_per_step": 0}, "tokens_per_step must be at least 1, got 0"),
    ({"seed": -3}, "seed must be at least 0, got -3"),
    ({"block_caching": 1}, "block_caching must be True or False, got 1"),
    ({"factor": 1.0, "tokens_per_step": 2}, "tokens_per_step and factor are different commit"),
    ({"steps": 8}, "steps (Fast-dLLM's fixed number of steps) works with policy prefix or dual"),
]


@pytest.mark.parametrize(("given", "sentence"), BAD, ids=lambda value: str(value)[:40])
def test_bad_settings_are_refused_with_a_sentence(given: dict, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        GenerationConfig(**given)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {"gamma": 2.0},
        {"gamma": -1},
        {"gamma": math.inf},
        {"threshold": 0.0},
        {"threshold": 1},
        {"window": 10**6},
        {"policy": "dual", "steps": 64},
    ],
)
def test_odd_but_meaningful_settings_are_accepted(given: dict) -> None:
    config = GenerationConfig(**given)
    for name, value in given.items():
        assert getattr(config, name) == value


def test_num_parameters_of_llada_8b() -> None:
    """The published count, docs of LLaDA-8B: 8,015,581,184."""
    config = ModelConfig(
        architecture="llada",
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        intermediate_size=12288,
        vocab_size=126464,
        max_length=4096,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        mask_id=126336,
        eos_id=126081,
    )
    assert config.num_parameters == 8_015_581_184
