"""Which rows policies plan: host arithmetic only, checked by hand."""

from __future__ import annotations

import pytest
from elastic_cache.config import GenerationConfig
from elastic_cache.plan import Plan
from elastic_cache.policies import make_policy
from elastic_cache.policies.base import Policy

EOS = 7


def start(masked: list[bool], **settings: object) -> Policy:
    return make_policy(masked, GenerationConfig(**settings), EOS)


def commit(policy: Policy, positions: list[int], tokens: list[int] | None = None) -> None:
    tokens = tokens or [1] * len(positions)
    policy.observe(tokens, 99)


def rows(plan: Plan | None) -> tuple[bool, list[int], list[int]]:
    assert plan is not None and plan.listed is not None
    assert plan.num_rows == len(plan.listed)
    return plan.is_full, list(plan.listed), list(plan.listed[: plan.num_candidates])


@pytest.mark.parametrize(("policy_name", "last"), [("dual", 5), ("prefix", 8)])
def test_blocks_start_at_the_first_mask_and_the_last_is_shorter(
    policy_name: str, last: int
) -> None:
    policy = start([False] * 2 + [True] * 6, policy=policy_name, block_length=3, gen_length=6)
    assert rows(policy.plan(0, 0)) == (True, list(range(2, last)), [2, 3, 4])
    commit(policy, [3])
    assert rows(policy.plan(0, 0)) == (False, list(range(2, last)), [2, 3, 4])
    commit(policy, [2, 4])
    is_full, _, candidates = rows(policy.plan(0, 0))
    assert is_full and candidates == [5, 6, 7]
    commit(policy, [5, 6, 7])
    assert policy.plan(0, 0) is None


def test_stops_after_the_block_in_which_eos_was_committed() -> None:
    policy = start([False] + [True] * 6, policy="dual", block_length=3)
    policy.plan(0, 0)
    commit(policy, [2], [EOS])
    assert rows(policy.plan(0, 0)) == (False, [1, 2, 3], [1, 2, 3])
    commit(policy, [1, 3])
    assert policy.plan(0, 0) is None


def test_blocks_without_a_mask_are_left_out() -> None:
    masked = [False, True, False, False, False, True, True]
    policy = start(masked, policy="dual", block_length=2)
    assert rows(policy.plan(0, 0))[2] == [1, 2]
    commit(policy, [1])
    assert rows(policy.plan(0, 0)) == (True, [5, 6], [5, 6])


def test_fixed_steps_spread_evenly_with_the_remainder_first() -> None:
    policy = start([False] + [True] * 10, policy="dual", block_length=5, steps=6)
    seen, position = [], 1
    while (plan := policy.plan(0, 0)) is not None:
        assert plan.num_commits is not None
        seen.append(plan.num_commits)
        commit(policy, list(range(position, position + plan.num_commits)))
        position += plan.num_commits
    assert seen == [2, 2, 1, 2, 2, 1]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(policy="rolling"), 96),
        (dict(policy="rolling", num_rows=32), 32),
        (dict(policy="rolling", num_rows=31), 0),
        (dict(policy="rolling", num_rows=24, window=12), 24),
        (dict(policy="rolling", num_rows=300), 120),
        (dict(policy="elastic"), 0),
        (dict(policy="none"), 0),
        (dict(policy="dual"), 0),
    ],
    ids=str,
)
def test_rows_are_steady_if_a_step_has_them_whatever_was_committed(
    settings: dict[str, object], expected: int
) -> None:
    assert start([False] * 20 + [True] * 100, **settings).steady_rows == expected
