"""What a user may rely on, on the embedded model: counts, EOS, infilling, seeds, streams."""

from __future__ import annotations

import math
import re

import elastic_cache
import pytest
import torch
from elastic_cache.engine import Engine

POLICIES = ("none", "prefix", "dual", "elastic", "rolling")
QUESTION = (
    "Ava has 12 apples. Then Ava buys 30 more apples. Then Ava gives half of the apples to a "
    "friend. How many apples does Ava have now?"
)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return elastic_cache.load("tiny", device="cpu", dtype="float32")


@pytest.mark.parametrize("policy", POLICIES)
def test_answer_counts_and_tail(engine: Engine, policy: str) -> None:
    out = engine.generate(QUESTION, gen_length=160, policy=policy, trace=True)
    eos, mask = engine.model.config.eos_id, engine.model.config.mask_id
    answer = out.ids[-160:].tolist()
    assert out.finish_reason == "eos"
    assert out.text is not None and re.search(r"\n#### \d+$", out.text)
    assert out.num_tokens == answer.index(eos)
    assert set(answer[out.num_tokens :]) == {eos}
    assert mask not in answer
    assert out.trace is not None and out.nfe == len(out.trace)
    assert out.tokens_per_forward == out.num_tokens / out.nfe
    depth = engine.model.config.num_layers
    expected = sum(depth - step.first_full_layer for step in out.trace) / (depth * out.nfe)
    assert out.update_frequency == pytest.approx(expected)
    committed = [position for step in out.trace for position in step.committed]
    assert len(committed) == len(set(committed))


@pytest.mark.parametrize("policy", POLICIES)
def test_stream_yields_what_trace_records(engine: Engine, policy: str) -> None:
    settings = dict(gen_length=48, policy=policy)
    traced = engine.generate(QUESTION, trace=True, **settings)
    request = engine.stream(QUESTION, **settings)
    with pytest.raises(RuntimeError, match="not finished"):
        _ = request.result
    seen, left = [], 48
    for step in request:
        assert request.tokens()[step.committed].tolist() == step.tokens
        left -= len(step.committed)
        if step.num_masked != left:  # an EOS dropped the masks behind it
            assert engine.model.config.eos_id in step.tokens and step.num_masked < left
            left = step.num_masked
        seen.append(step)
    assert seen == traced.trace
    assert torch.equal(request.result.ids, traced.ids)
    assert next(iter(request), None) is None


def test_gamma_zero_never_and_above_one_always_refreshes(engine: Engine) -> None:
    depth = engine.model.config.num_layers
    never = engine.generate(QUESTION, gen_length=32, gamma=0.0, trace=True).trace
    always = engine.generate(QUESTION, gen_length=32, gamma=2.0, trace=True).trace
    assert never and always
    assert [step.first_full_layer for step in never] == [-1] + [depth] * (len(never) - 1)
    assert [step.first_full_layer for step in always] == [-1] + [1] * (len(always) - 1)


def test_tracked_tokens_are_decoded_positions(engine: Engine) -> None:
    out = engine.generate(QUESTION, gen_length=64, track_num=3, trace=True)
    length = out.ids.numel()
    masked = set(range(length - 64, length))
    assert out.trace
    for step in out.trace:
        assert step.tracked == sorted(set(step.tracked))
        # Chosen among what was decoded before this step's commit; dropped tails count as such.
        if step.num_masked + len(step.committed) == len(masked):
            assert not masked.intersection(step.tracked)
        masked -= set(step.committed)


def test_infilling_decodes_the_gaps_and_keeps_the_rest(engine: Engine) -> None:
    full = engine.generate(QUESTION, gen_length=96, policy="none").ids
    mask = engine.model.config.mask_id
    start = len(full) - 96
    gaps = [start + 5, start + 6, start + 20]
    ids = full.clone()
    ids[gaps] = mask
    for policy in POLICIES:
        out = engine.generate(ids, gen_length=0, policy=policy)
        keep = torch.ones(len(ids), dtype=torch.bool)
        keep[gaps] = False
        assert torch.equal(out.ids[keep], full[keep])
        assert mask not in out.ids.tolist()
        assert out.num_tokens == 3


def test_infilling_never_overwrites_text_behind_an_eos(engine: Engine) -> None:
    config = engine.model.config
    ids = engine.generate(QUESTION, gen_length=96, policy="none").ids
    end = ids.tolist().index(config.eos_id, len(ids) - 96)
    tail = [11, 12, 13]
    ids = torch.cat([ids[:end], torch.tensor([config.mask_id] + tail)])
    out = engine.generate(ids, gen_length=0)
    assert out.ids[-3:].tolist() == tail


def test_prompt_forms_agree(engine: Engine) -> None:
    tokenizer = engine.model.tokenizer
    assert tokenizer is not None
    chat = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.encode(tokenizer.render_chat(chat))
    outs = [
        engine.generate(prompt, gen_length=16)
        for prompt in (QUESTION, chat, ids, torch.tensor(ids), torch.tensor([ids]))
    ]
    for out in outs:
        assert torch.equal(out.ids, outs[0].ids)
        assert out.ids.dtype == torch.int64 and out.ids.shape == (len(ids) + 16,)


def test_sampling_is_repeatable_by_seed_and_differs_between_seeds(engine: Engine) -> None:
    def sample(seed: int) -> list[int]:
        out = engine.generate(QUESTION, gen_length=48, temperature=1.0, seed=seed)
        return out.ids.tolist()

    assert sample(1) == sample(1)
    assert len({tuple(sample(seed)) for seed in range(4)}) > 1


def test_commit_rules(engine: Engine) -> None:
    def commits(**settings: object) -> list[int]:
        trace = engine.generate(QUESTION, gen_length=40, trace=True, **settings).trace
        assert trace is not None
        return [len(step.committed) for step in trace]

    fixed = commits(tokens_per_step=2)
    assert set(fixed[:-1]) == {2}
    assert all(count >= 1 for count in commits(threshold=1.0))
    assert commits(threshold=0.0)[0] == 16
    # factor: the r-th best is committed while conf >= 1 - f / (r + 1); a huge factor takes all.
    assert commits(factor=1000.0)[0] == 16
    assert set(commits(factor=0.0)) == {1}
    for policy in ("prefix", "dual"):
        assert commits(policy=policy, block_length=20, steps=16) == [3] * 4 + [2] * 4 + (
            [3] * 4 + [2] * 4
        )


def test_every_row_is_computed_without_block_caching(engine: Engine) -> None:
    out = engine.generate(QUESTION, gen_length=64, block_caching=False, trace=True)
    assert out.trace
    masked = 64
    for previous, step in zip(out.trace, out.trace[1:], strict=False):
        masked = previous.num_masked
        assert step.num_rows == masked + len(previous.committed) + len(previous.tracked)


def test_bfloat16_answers(engine: Engine) -> None:
    half = elastic_cache.load("tiny", dtype="bfloat16")
    out = half.generate(QUESTION, gen_length=64)
    assert out.text and "12 apples" in out.text


BAD_PROMPTS = [
    ("", "the prompt is empty"),
    ("   \n", "the prompt is empty"),
    ([], "the prompt is empty"),
    ("say <|mdm_mask|> please", "contains the mask token as text"),
    ([{"role": "user", "content": "a <|mdm_mask|>"}], "contains the mask token as text"),
    ([{"role": "<|mdm_mask|>", "content": "a"}], "contains the mask token as text"),
    ([5, 10**6], "prompt ids must be between 0 and 767, got 1000000"),
    ([5, -1], "prompt ids must be between 0 and 767, got -1"),
    ([0.5, 1.5], "prompt ids must be whole numbers"),
    (torch.zeros(2, 3, dtype=torch.int64), "prompt ids must be one sequence"),
    pytest.param(object(), "the prompt must be text, chat messages or token ids", id="object"),
    ([1] * 5000, "takes at most 4096"),
]


@pytest.mark.parametrize(("prompt", "sentence"), BAD_PROMPTS, ids=lambda value: str(value)[:24])
def test_bad_prompts_are_refused(engine: Engine, prompt: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        engine.generate(prompt, gen_length=16)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"gen_length": 0}, "gen_length must be at least 1, got 0"),
        ({"gama": 0.5}, "there is no setting 'gama': did you mean gamma?"),
        ({"gamma": math.nan}, "gamma must be a number"),
        ({"gen_length": 4096}, "takes at most 4096"),
        ({"policy": "dual", "steps": 3, "gen_length": 64}, "steps must be a multiple of"),
        ({"policy": "dual", "steps": 200, "gen_length": 64}, "at most 64 steps are possible"),
    ],
)
def test_bad_settings_are_refused(engine: Engine, settings: dict, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        engine.generate(QUESTION, **{"gen_length": 16, **settings})
    assert sentence in str(caught.value)


def test_nan_logits_stop_the_request_and_leave_the_engine_usable() -> None:
    engine = elastic_cache.load("tiny")
    good = engine.generate(QUESTION, gen_length=16).ids
    norm = engine.model.weights.final_norm
    kept = norm.clone()
    norm[3] = math.nan
    with pytest.raises(elastic_cache.NonFiniteLogitsError, match="not finite numbers at step 0"):
        engine.generate(QUESTION, gen_length=16)
    norm.copy_(kept)
    assert torch.equal(engine.generate(QUESTION, gen_length=16).ids, good)


@pytest.mark.parametrize("name", ["device", "dtype"])
def test_load_refuses_what_it_cannot_serve(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        elastic_cache.load("tiny", **{name: "quantum"})
