"""Answers -> the figures of every cell, with 95 % confidence intervals.

    correct        share of problems, Wilson's interval
    tokens/s       all tokens over all seconds, bootstrap over problems
    ratio          of two cells' tokens/s, bootstrap over the problems that both have answered
    agreement      with the matched full recompute, problem by problem

Of repeated answers to a problem, the one with the median time counts. Times of steps leave out
every answer's first one, a full forward, which is given apart; cold answers are given apart too.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from elastic_cache.lab.answers import COLD, Answer
from elastic_cache.lab.cells import Cell

Z_95 = 1.959964
NUM_RESAMPLES = 2000

Answers = dict[int, Answer]  # of one cell, by problem


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Agreement:
    """A cell against the full recompute with the same window, rule and EOS (or nearest to it).

    Attributes:
        reference: that cell's name.
        num_problems: answered by both.
        tokens_equal: share of the longer answer's positions with equal tokens, over all problems.
        num_lost, num_won: problems that only the reference, or only this cell, got right.
        difference: of the shares of correct answers, this cell's less the reference's, paired.
    """

    reference: str
    num_problems: int
    tokens_equal: float
    num_lost: int
    num_won: int
    difference: Estimate


@dataclass(frozen=True)
class Figures:
    """One cell over all problems; milliseconds and bytes."""

    cell: str
    policy: str
    num_problems: int
    num_tokens: int
    correct: Estimate
    tokens_per_second: Estimate
    tokens_per_forward: float
    nfe: float
    update_frequency: float
    seconds: float
    cold_seconds: float | None
    first_step_ms: float | None
    step_ms_p50: float | None
    step_ms_p95: float | None
    step_ms_p99: float | None
    peak_bytes: int | None
    agreement: Agreement | None


@dataclass(frozen=True)
class Summary:
    """All cells; `ratios[a][b]` is a's tokens/s over b's."""

    figures: list[Figures]
    ratios: dict[str, dict[str, Estimate]]


def summarize(cells: Sequence[Cell], answers: Sequence[Answer]) -> Summary:
    """Figures of the cells that have answers, in the order of `cells`."""
    warm = {cell.name: choose(cell.name, answers) for cell in cells}
    present = [cell for cell in cells if warm[cell.name]]
    figures = [_figures(cell, present, warm, answers) for cell in present]
    ratios = {
        one.name: {
            other.name: speed_ratio(warm[one.name], warm[other.name])
            for other in present
            if other is not one and warm[one.name].keys() & warm[other.name].keys()
        }
        for one in present
    }
    return Summary(figures, ratios)


def choose(cell: str, answers: Sequence[Answer]) -> Answers:
    """The answer that stands for each problem: of several, the one with the median time."""
    by_problem: dict[int, list[Answer]] = {}
    for answer in answers:
        if answer.cell == cell and answer.repeat != COLD:
            by_problem.setdefault(answer.problem, []).append(answer)
    return {
        problem: sorted(repeats, key=lambda answer: answer.seconds)[(len(repeats) - 1) // 2]
        for problem, repeats in sorted(by_problem.items())
    }


def _figures(
    cell: Cell, cells: Sequence[Cell], warm: dict[str, Answers], answers: Sequence[Answer]
) -> Figures:
    own = list(warm[cell.name].values())
    tokens, nfe = sum(len(answer.ids) for answer in own), sum(answer.nfe for answer in own)
    cold = [a.seconds for a in answers if a.cell == cell.name and a.repeat == COLD]
    first = [1e3 * answer.step_seconds[0] for answer in own if answer.step_seconds]
    later = [1e3 * seconds for answer in own for seconds in answer.step_seconds[1:]]
    peaks = [answer.peak_bytes for answer in own if answer.peak_bytes is not None]
    return Figures(
        cell=cell.name,
        policy=cell.policy,
        num_problems=len(own),
        num_tokens=tokens,
        correct=wilson(sum(answer.is_correct for answer in own), len(own)),
        tokens_per_second=speed(own),
        tokens_per_forward=tokens / nfe,
        nfe=nfe / len(own),
        update_frequency=sum(a.update_frequency * a.nfe for a in own) / nfe,
        seconds=sum(answer.seconds for answer in own),
        cold_seconds=cold[0] if cold else None,
        first_step_ms=statistics.median(first) if first else None,
        step_ms_p50=quantile(later, 0.5),
        step_ms_p95=quantile(later, 0.95),
        step_ms_p99=quantile(later, 0.99),
        peak_bytes=max(peaks, default=None),
        agreement=_agreement(cell, cells, warm),
    )


def quantile(values: Sequence[float], share: float) -> float | None:
    """Between neighbours; None of no values."""
    if not values:
        return None
    return float(torch.quantile(torch.tensor(values, dtype=torch.float64), share))


def wilson(hits: int, count: int) -> Estimate:
    """A share and Wilson's score interval."""
    share, z2 = hits / count, Z_95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))


def _sizes(answers: Sequence[Answer]) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.tensor([len(answer.ids) for answer in answers], dtype=torch.float64)
    return tokens, torch.tensor([answer.seconds for answer in answers], dtype=torch.float64)


def _resamples(count: int) -> torch.Tensor:
    """Indices [NUM_RESAMPLES, count], the same for the same count."""
    return torch.randint(count, (NUM_RESAMPLES, count), generator=torch.Generator().manual_seed(0))


def _interval(value: float, samples: torch.Tensor) -> Estimate:
    low, high = torch.quantile(samples, torch.tensor([0.025, 0.975], dtype=samples.dtype)).tolist()
    return Estimate(value, low, high)


def speed(answers: Sequence[Answer]) -> Estimate:
    """Tokens per second of all answers together."""
    tokens, seconds = _sizes(answers)
    picked = _resamples(len(answers))
    samples = tokens[picked].sum(1) / seconds[picked].sum(1)
    return _interval(float(tokens.sum() / seconds.sum()), samples)


def speed_ratio(one: Answers, other: Answers) -> Estimate:
    """one's tokens/s over other's, over the problems that both answered."""
    common = sorted(one.keys() & other.keys())
    a, s = _sizes([one[problem] for problem in common])
    b, t = _sizes([other[problem] for problem in common])
    picked = _resamples(len(common))
    samples = (a[picked].sum(1) / s[picked].sum(1)) / (b[picked].sum(1) / t[picked].sum(1))
    return _interval(float((a.sum() / s.sum()) / (b.sum() / t.sum())), samples)


def _agreement(cell: Cell, cells: Sequence[Cell], warm: dict[str, Answers]) -> Agreement | None:
    wanted = cell.full_recompute()
    reference = next((c for c in cells if c.settings == wanted), None)
    if reference is None or reference is cell:
        return None
    own, full = warm[cell.name], warm[reference.name]
    common = sorted(own.keys() & full.keys())
    if not common:
        return None
    pairs = [(own[problem], full[problem]) for problem in common]
    equal = sum(a == b for one, two in pairs for a, b in zip(one.ids, two.ids, strict=False))
    longest = sum(max(len(one.ids), len(two.ids)) for one, two in pairs)
    lost = sum(two.is_correct and not one.is_correct for one, two in pairs)
    won = sum(one.is_correct and not two.is_correct for one, two in pairs)
    return Agreement(
        reference=reference.name,
        num_problems=len(pairs),
        tokens_equal=equal / longest if longest else 1.0,
        num_lost=lost,
        num_won=won,
        difference=paired_difference(lost, won, len(pairs)),
    )


def paired_difference(lost: int, won: int, count: int) -> Estimate:
    """Of two shares over the same problems, by the variance of the discordant pairs."""
    value = (won - lost) / count
    half = Z_95 * math.sqrt(max(0.0, (won + lost) / count - value**2) / count)
    return Estimate(value, value - half, value + half)
