"""A sequence's steps do not depend on the others in the batch: every bit, on a CPU."""

from __future__ import annotations

import random
from typing import Any

import elastic_cache
import pytest
import torch
from elastic_cache.batch import Batch, Outcome
from elastic_cache.engine import Engine
from elastic_cache.errors import NonFiniteLogitsError
from elastic_cache.problems import problems
from elastic_cache.request import Request
from elastic_cache.types import Generation, Step

QUESTIONS = [question for question, _ in problems(seed=5, count=12)]
KINDS: list[dict[str, Any]] = [
    dict(),
    dict(gamma=0.99),
    dict(gamma=0.99, window=8),
    dict(gamma=2.0),
    dict(window=24, tokens_per_step=2),
    dict(temperature=0.8, seed=5),
    dict(gamma=0.99, temperature=0.9, seed=8),
    dict(policy="none"),
    dict(policy="none", temperature=0.5, seed=1),
    dict(policy="rolling"),
    dict(policy="rolling", num_rows=32, factor=0.5),
    dict(policy="rolling", num_rows=24, temperature=0.6, seed=2),
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return elastic_cache.load("tiny")


class Crowd:
    """Requests in a batch, with the steps that each has made."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.steps: dict[Request, list[Step]] = {}

    def add(self, question: str, settings: dict[str, Any]) -> Request:
        request = self.batch.add(question, **settings)
        self.steps[request] = []
        return request

    def step(self) -> list[Outcome]:
        outcomes = self.batch.step()
        for outcome in outcomes:
            if outcome.step is not None:
                self.steps[outcome.request].append(outcome.step)
        return outcomes

    def check(self, request: Request, alone: Generation) -> None:
        assert self.steps[request] == alone.trace
        assert torch.equal(request.result.ids, alone.ids)
        for name in ("text", "num_tokens", "nfe", "update_frequency", "finish_reason", "settings"):
            assert getattr(request.result, name) == getattr(alone, name)


@pytest.fixture(scope="module")
def bfloat16_engine() -> Engine:
    return elastic_cache.load("tiny", dtype="bfloat16", batch_invariant=True)


@pytest.mark.parametrize(("seed", "max_full_rows"), [(0, 512), (1, 100), (2, 300)])
@pytest.mark.parametrize("kind", ["engine", "bfloat16_engine"])
def test_steps_are_those_of_a_request_alone(
    request: pytest.FixtureRequest, kind: str, seed: int, max_full_rows: int
) -> None:
    """Requests of all kinds join when a lane is free, or some steps later; some are taken out."""
    check_a_crowd(request.getfixturevalue(kind), seed, max_full_rows)


def check_a_crowd(engine: Engine, seed: int, max_full_rows: int) -> None:
    dice = random.Random(seed)
    asked = [
        (dice.choice(QUESTIONS), dict(gen_length=dice.choice([16, 48]), **kind)) for kind in KINDS
    ]
    dice.shuffle(asked)
    alone = [engine.generate(question, trace=True, **given) for question, given in asked]
    crowd = Crowd(engine.batch(4, max_length=300, max_full_rows=max_full_rows))
    waiting, running, num_removed = list(range(len(asked))), dict[Request, int](), 0
    num_held = 0
    while waiting or running:
        while waiting and crowd.batch.num_free and dice.random() < 0.7:
            index = waiting.pop(0)
            running[crowd.add(*asked[index])] = index
        if running and num_removed < 3 and dice.random() < 0.1:
            request = dice.choice(list(running))
            crowd.batch.remove(request)
            waiting.append(running.pop(request))
            num_removed += 1
        for outcome in crowd.step():
            assert outcome.error is None
            if outcome.is_over:
                crowd.check(outcome.request, alone[running.pop(outcome.request)])
        num_held += len(crowd.batch._held)
    assert num_removed == 3
    assert (num_held > 0) == (max_full_rows < 512)


def test_full_passes_of_a_step_are_bounded(engine: Engine) -> None:
    """Four requests join at once: their first steps are spread over four steps of the batch."""
    crowd = Crowd(engine.batch(4, max_length=300, max_full_rows=150))
    asked = [question for question in QUESTIONS if len(question) > 170][:4]
    requests = [crowd.add(question, dict(gen_length=16)) for question in asked]
    assert all(75 < len(request.prompt.ids) <= 150 for request in requests)
    for count in range(1, 5):
        crowd.step()
        assert sum(bool(crowd.steps[request]) for request in requests) == count


@pytest.mark.parametrize(
    "kind", [dict(), dict(gamma=2.0), dict(policy="none"), dict(temperature=0.8, seed=3)], ids=str
)
def test_a_long_full_pass_is_spread_over_steps_by_layers(
    engine: Engine, kind: dict[str, Any]
) -> None:
    """60 rows through 32 layers a step: the other request is never kept from its own step."""
    kind = dict(gen_length=128, **kind)
    asked = [(QUESTIONS[1], dict(gen_length=64, policy="rolling")), (QUESTIONS[2], kind)]
    alone = [engine.generate(question, trace=True, **given) for question, given in asked]
    crowd = Crowd(engine.batch(2, max_length=300, max_full_rows=60))
    other = crowd.add(*asked[0])
    while not crowd.steps[other]:
        crowd.step()
    long = crowd.add(*asked[1])
    layers = 60 * 32 // len(long.prompt.ids)
    assert 1 < layers < 16
    for count in range(1, -(-32 // layers) + 1):
        assert not crowd.steps[long]
        crowd.step()
        assert len(crowd.steps[other]) == 1 + count
    assert len(crowd.steps[long]) == 1
    while crowd.batch.requests:
        crowd.step()
    for request, expected in zip((other, long), alone, strict=True):
        crowd.check(request, expected)


def test_who_has_waited_longest_for_a_full_pass_is_next(engine: Engine) -> None:
    """One full pass a step, for two requests that need nothing else, one that is refreshed in every
    step, and one that joins: none of them waits for another to end."""
    crowd = Crowd(engine.batch(4, max_length=300, max_full_rows=250))
    kinds: list[dict[str, Any]] = [dict(policy="none"), dict(policy="none"), dict(gamma=2.0)]
    requests = [
        crowd.add(question, dict(gen_length=96, **kind))
        for question, kind in zip(QUESTIONS, kinds, strict=False)
    ]
    for _ in range(9):
        crowd.step()
    assert [len(crowd.steps[request]) for request in requests] == [3, 3, 3]
    requests.append(crowd.add(QUESTIONS[3], dict(gen_length=96)))
    for _ in range(4):
        crowd.step()
    assert len(crowd.steps[requests[3]]) >= 1
    assert [len(crowd.steps[request]) for request in requests[:3]] == [4, 4, 4]


def test_a_request_without_probabilities_fails_alone(engine: Engine) -> None:
    asked = [(question, dict(gen_length=48)) for question in QUESTIONS[:3]]
    alone = [engine.generate(question, trace=True, **given) for question, given in asked]
    crowd = Crowd(engine.batch(3, max_length=300))
    requests = [crowd.add(question, given) for question, given in asked]
    crowd.step()
    cached = crowd.batch._runner._forward._cache
    with torch.inference_mode():
        cached.layers[0].v[cached.capacity + 3].fill_(float("nan"))
    failed = []
    while crowd.batch.requests:
        failed += [outcome for outcome in crowd.step() if outcome.error is not None]
    assert [outcome.request for outcome in failed] == [requests[1]]
    assert isinstance(failed[0].error, NonFiniteLogitsError) and failed[0].is_over
    for index in (0, 2):
        crowd.check(requests[index], alone[index])
    # The lane is as good as new.
    again = crowd.add(*asked[1])
    while crowd.batch.requests:
        crowd.step()
    crowd.check(again, alone[1])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(policy="dual"), "policy 'dual' decodes one request at a time"),
        (dict(gen_length=300), "tokens, but requests that are answered together have at most 300"),
        (dict(window=33), "window must be at most 32 for requests that are answered together"),
        (dict(policy="rolling", num_rows=129), "num_rows must be at most 128"),
        (dict(track_num=2), "track_num must be 1"),
        (dict(block_caching=False), "block_caching must be True"),
        (dict(gama=1), "did you mean gamma"),
    ],
)
def test_what_a_batch_cannot_decode_is_refused(
    engine: Engine, settings: dict[str, Any], sentence: str
) -> None:
    batch = engine.batch(1, max_length=300)
    with pytest.raises(ValueError, match=sentence):
        batch.add(QUESTIONS[0], **{"gen_length": 64, **settings})
    assert batch.num_free == 1


def test_what_a_batch_cannot_do_is_said(engine: Engine) -> None:
    with pytest.raises(ValueError, match="num_lanes must be at least 1, got 0"):
        engine.batch(0)
    with pytest.raises(ValueError, match="max_length must be between 1 and 4096, got 5000"):
        engine.batch(1, max_length=5000)
    batch = engine.batch(1, max_length=300)
    request = batch.add(QUESTIONS[0], gen_length=16)
    with pytest.raises(RuntimeError, match="all 1 lanes of the batch are taken"):
        batch.add(QUESTIONS[1], gen_length=16)
    with pytest.raises(RuntimeError, match="one of a batch: step the batch"):
        request.step()


def test_a_stopped_request_is_as_it_stands(engine: Engine) -> None:
    request = engine.stream(QUESTIONS[0], gen_length=64)
    steps = [next(request) for _ in range(4)]
    answer = request.stop("deadline")
    committed = {
        at: token for step in steps for at, token in zip(step.committed, step.tokens, strict=True)
    }
    mask = engine.model.config.mask_id
    assert answer.finish_reason == "deadline" and answer.nfe == 4
    assert answer.num_tokens == len(committed) > 3
    for position, token in enumerate(answer.ids.tolist()[request.prompt.text_start :]):
        assert token == committed.get(position + request.prompt.text_start, mask)
    assert engine.model.tokenizer is not None
    in_order = [committed[position] for position in sorted(committed)]
    assert answer.text == engine.model.tokenizer.decode(in_order)
    assert request.stop("again") is answer and request.step() is None
