"""Which rows the block policies plan: host arithmetic only, checked by hand."""

from __future__ import annotations

import pytest
import torch
from elastic_cache.config import GenerationConfig
from elastic_cache.plan import Plan
from elastic_cache.policies import make_policy
from elastic_cache.policies.base import Policy
from elastic_cache.state import DecodeState
from elastic_cache.types import Step

EOS = 7


def start(masked: list[bool], **settings: object) -> tuple[Policy, DecodeState]:
    flags = torch.tensor(masked)
    state = DecodeState.start(torch.zeros(len(masked), dtype=torch.int64), flags, 2, 1)
    return make_policy(state, GenerationConfig(**settings), EOS), state


def commit(policy: Policy, positions: list[int], tokens: list[int] | None = None) -> None:
    tokens = tokens or [1] * len(positions)
    policy.observe(Step(0, 0, positions, tokens, [1.0] * len(positions), [], 0, 99))


def rows(plan: Plan | None) -> tuple[bool, list[int], list[int]]:
    assert plan is not None
    assert plan.rows[plan.candidate_rows].tolist() == plan.candidates.tolist()
    return plan.is_full, plan.rows.tolist(), plan.candidates.tolist()


@pytest.mark.parametrize(("policy_name", "last"), [("dual", 5), ("prefix", 8)])
def test_blocks_start_at_the_first_mask_and_the_last_is_shorter(
    policy_name: str, last: int
) -> None:
    policy, state = start(
        [False] * 2 + [True] * 6, policy=policy_name, block_length=3, gen_length=6
    )
    assert rows(policy.plan(state)) == (True, list(range(2, last)), [2, 3, 4])
    commit(policy, [3])
    assert rows(policy.plan(state)) == (False, list(range(2, last)), [2, 3, 4])
    commit(policy, [2, 4])
    is_full, _, candidates = rows(policy.plan(state))
    assert is_full and candidates == [5, 6, 7]
    commit(policy, [5, 6, 7])
    assert policy.plan(state) is None


def test_stops_after_the_block_in_which_eos_was_committed() -> None:
    policy, state = start([False] + [True] * 6, policy="dual", block_length=3)
    policy.plan(state)
    commit(policy, [2], [EOS])
    assert rows(policy.plan(state)) == (False, [1, 2, 3], [1, 2, 3])
    commit(policy, [1, 3])
    assert policy.plan(state) is None


def test_blocks_without_a_mask_are_left_out() -> None:
    masked = [False, True, False, False, False, True, True]
    policy, state = start(masked, policy="dual", block_length=2)
    assert rows(policy.plan(state))[2] == [1, 2]
    commit(policy, [1])
    assert rows(policy.plan(state)) == (True, [5, 6], [5, 6])


def test_fixed_steps_spread_evenly_with_the_remainder_first() -> None:
    policy, state = start([False] + [True] * 10, policy="dual", block_length=5, steps=6)
    seen, position = [], 1
    while (plan := policy.plan(state)) is not None:
        assert plan.num_commits is not None
        seen.append(plan.num_commits)
        commit(policy, list(range(position, position + plan.num_commits)))
        position += plan.num_commits
    assert seen == [2, 2, 1, 2, 2, 1]
