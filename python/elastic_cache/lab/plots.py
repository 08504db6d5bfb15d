"""Figures -> pictures: accuracy against speed, refreshed layers over steps, drift by depth.

Needs matplotlib. A picture that the run has no data for is not drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from elastic_cache.lab.answers import Answer
from elastic_cache.lab.summary import Estimate, Summary, choose

SPEED, REFRESHES, DRIFT = "accuracy-speed.png", "refreshed-layers.png", "drift-by-depth.png"
_MIN_RUNNING = 0.05  # steps that fewer answers reach are not drawn: a handful is no share


def draw(folder: Path, summary: Summary, answers: Sequence[Answer], depth: int) -> list[str]:
    """Writes what there is to see into `folder`; returns the names of the files.

    Args:
        depth: number of layers of the model.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError(
            "the pictures need matplotlib: pip install matplotlib, then give the same command "
            "again with --report"
        ) from None
    matplotlib.use("Agg")
    names = [SPEED]
    _draw_speed(folder / SPEED, summary)
    tested = {
        figures.cell: list(choose(figures.cell, answers).values())
        for figures in summary.figures
        if any(answer.similarity for answer in answers if answer.cell == figures.cell)
    }
    if tested:
        names += [REFRESHES, DRIFT]
        _draw_refreshes(folder / REFRESHES, tested, depth)
        _draw_drift(folder / DRIFT, tested)
    return names


def _figure(width: float, height: float, rows: int = 1) -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, squeeze=False, figsize=(width, height), dpi=150)
    return figure, [row[0] for row in axes]


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _bars(estimate: Estimate, scale: float = 1.0) -> list[list[float]]:
    return [
        [scale * (estimate.value - estimate.low)],
        [scale * (estimate.high - estimate.value)],
    ]


def _draw_speed(path: Path, summary: Summary) -> None:
    """A point a cell; cells of one policy are joined, which makes a sweep a curve."""
    figure, (axes,) = _figure(8, 5)
    for policy in dict.fromkeys(figures.policy for figures in summary.figures):
        own = [figures for figures in summary.figures if figures.policy == policy]
        own.sort(key=lambda figures: figures.tokens_per_second.value)
        x = [figures.tokens_per_second.value for figures in own]
        y = [100 * figures.correct.value for figures in own]
        (line,) = axes.plot(x, y, "o-", label=policy, linewidth=1)
        for figures, at_x, at_y in zip(own, x, y, strict=True):
            axes.errorbar(
                at_x, at_y, _bars(figures.correct, 100), _bars(figures.tokens_per_second),
                color=line.get_color(), linewidth=0.7, capsize=2,
            )  # fmt: skip
    # Neighbours along the axis are labelled above and below in turns, so that they stay legible.
    ordered = sorted(summary.figures, key=lambda figures: figures.tokens_per_second.value)
    for index, figures in enumerate(ordered):
        at = figures.tokens_per_second.value, 100 * figures.correct.value
        offset = (5, 5 if index % 2 else -10)
        axes.annotate(figures.cell, at, xytext=offset, textcoords="offset points", fontsize=7)
    axes.margins(x=0.12)
    axes.set_xlabel("tokens per second (to the first EOS, batch 1)")
    axes.set_ylabel("correct answers, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, path)


def refreshed_share(answers: Sequence[Answer], depth: int) -> torch.Tensor:
    """[layers, steps after the first]: share of the answers still running that ran the layer in
    full mode."""
    lengths = sorted((len(answer.first_full_layers) for answer in answers), reverse=True)
    needed = max(1, int(_MIN_RUNNING * len(answers)))
    steps = lengths[min(needed, len(lengths)) - 1]
    counts, running = torch.zeros(depth, steps), torch.zeros(steps)
    for answer in answers:
        for step, first in enumerate(answer.first_full_layers[:steps]):
            running[step] += 1
            counts[max(first, 0) :, step] += 1
    return counts / running.clamp(min=1)


def _draw_refreshes(path: Path, tested: dict[str, list[Answer]], depth: int) -> None:
    figure, rows = _figure(8, 2.6 * len(tested), len(tested))
    for axes, (cell, answers) in zip(rows, tested.items(), strict=True):
        share = refreshed_share(answers, depth)
        image = axes.imshow(
            share.mul(100).tolist(),
            origin="lower",
            aspect="auto",
            vmin=0,
            vmax=100,
            interpolation="nearest",
        )
        axes.set_title(f"{cell}: layers recomputed for every position, % of answers", fontsize=9)
        axes.set_xlabel("step")
        axes.set_ylabel("layer")
        figure.colorbar(image, ax=axes)
    _save(figure, path)


def _draw_drift(path: Path, tested: dict[str, list[Answer]]) -> None:
    figure, (axes,) = _figure(8, 4)
    for cell, answers in tested.items():
        axes.plot(mean_similarity(answers), label=cell, linewidth=1)
    axes.set_xlabel("layer")
    axes.set_ylabel("mean cosine of the drift test")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, path)


def mean_similarity(answers: Sequence[Answer]) -> list[float]:
    """By layer, over the answers whose test reached it; NaN where none did."""
    depth = max(len(answer.similarity) for answer in answers)
    means = []
    for layer in range(depth):
        found = [
            value
            for answer in answers
            if layer < len(answer.similarity) and (value := answer.similarity[layer]) is not None
        ]
        means.append(sum(found) / len(found) if found else float("nan"))
    return means
