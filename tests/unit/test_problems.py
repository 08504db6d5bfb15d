"""The problem generator: the same problems for ever, and answers that are right."""

from __future__ import annotations

import hashlib
import json
import random
import re

import pytest
from elastic_cache.problems import final_number, problem, problems


@pytest.mark.parametrize(
    ("seed", "count", "digest"),
    [
        (0, 200, "193d06c640288c3096062ae76511dd248fe8b9b2bed68c2b1434197d4a444767"),
        (1, 2000, "1f224ae216ffd1767d43281434fd9a561413a3473046ca0531a2736d9481d9d2"),
        (12345, 500, "f2169d9ba43f25d6879e7af72a8b55476b977cf904d9481349dfb9f2c1d967e1"),
        (2**31, 100, "9bf71579a32fe4c4896a32f0f5dbfbbbf44aab55210a0271ee385c378eca7afc"),
    ],
)
def test_a_seed_gives_the_recorded_problems(seed: int, count: int, digest: str) -> None:
    text = json.dumps(problems(seed, count))
    assert hashlib.sha256(text.encode()).hexdigest() == digest


def test_a_longer_list_begins_with_the_shorter() -> None:
    assert problems(7, 30)[:10] == problems(7, 10)


def test_every_calculation_is_right() -> None:
    rng = random.Random(42)
    calculation = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")
    for _ in range(500):
        question, answer = problem(rng)
        calculations = calculation.findall(answer)
        assert len(calculations) >= 2
        for left, sign, right, result in calculations:
            a, b = int(left), int(right)
            value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]
            assert value == int(result)
        assert 1 <= int(calculations[-1][3]) <= 999
        assert final_number(answer) == int(calculations[-1][3])
        assert question.endswith("have now?") and "####" not in question


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("a\n#### 42", 42),
        ("####7 apples", 7),
        ("#### 1\n#### 2", 1),
        ("#### -3", -3),
        ("#### ", None),
        ("42", None),
        ("", None),
    ],
)
def test_final_number(text: str, number: int | None) -> None:
    assert final_number(text) == number
