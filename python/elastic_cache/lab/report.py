"""Figures -> a table for the terminal, a page in Markdown, and JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from elastic_cache.lab.answers import Record
from elastic_cache.lab.summary import Agreement, Estimate, Figures, Summary

HEADER = (
    "cell", "correct", "tok/s", "vs first", "tok/fwd", "forwards", "updates", "first ms", "p50 ms",
    "p95 ms", "p99 ms", "cold s", "memory", "tokens equal", "lost/won",
)  # fmt: skip


def table(summary: Summary) -> list[tuple[str, ...]]:
    """One row a cell, under HEADER."""
    return [_row(figures, summary) for figures in summary.figures]


def _row(figures: Figures, summary: Summary) -> tuple[str, ...]:
    first = summary.figures[0].cell
    ratio = summary.ratios[figures.cell].get(first)
    return (
        figures.cell,
        f"{_percent(figures.correct)} of {figures.num_problems}",
        _interval(figures.tokens_per_second, "{:.1f}"),
        "-" if ratio is None else f"{ratio.value:.2f}x",
        f"{figures.tokens_per_forward:.2f}",
        f"{figures.nfe:.1f}",
        f"{figures.update_frequency:.1%}",
        _optional(figures.first_step_ms),
        _optional(figures.step_ms_p50),
        _optional(figures.step_ms_p95),
        _optional(figures.step_ms_p99),
        _optional(figures.cold_seconds),
        "-" if figures.peak_bytes is None else f"{figures.peak_bytes / 1e9:.2f} GB",
        *_agreement(figures.agreement),
    )


def _agreement(agreement: Agreement | None) -> tuple[str, str]:
    if agreement is None:
        return "-", "-"
    return f"{agreement.tokens_equal:.1%}", f"{agreement.num_lost}/{agreement.num_won}"


def _optional(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(estimate: Estimate) -> str:
    return f"{estimate.value:.1%} ({100 * estimate.low:.1f} to {100 * estimate.high:.1f})"


def _interval(estimate: Estimate, form: str) -> str:
    value, low, high = map(form.format, (estimate.value, estimate.low, estimate.high))
    return f"{value} ({low} to {high})"


def machines(record: Record) -> list[str]:
    """Where it ran, each machine once."""
    lines = [
        f"{m['gpu'] or m['cpu']}, {m['threads']} threads, torch {m['torch']}, {m['dtype']}, "
        f"elastic_cache {m['elastic_cache']}"
        for m in record.machines
    ]
    return list(dict.fromkeys(lines))


def markdown(record: Record, summary: Summary, command: str, pictures: Sequence[str]) -> str:
    """A page: the setting, the table, ratios, agreement, pictures."""
    run = record.run
    parts = [
        "# Policies side by side",
        f"`{command}`",
        "\n".join(f"- {line}" for line in (*machines(record), *_setting(run))),
        _markdown_table(HEADER, table(summary)),
        "In parentheses: 95 % confidence. Tokens are counted to the first EOS; prompt and tail are "
        "not. `first ms` is the full forward that an answer begins with; p50, p95 and p99 are of "
        "all later steps. `cold s` is a cell's very first answer, which counts nowhere else.",
        "## Tokens per second, row over column",
        _ratio_table(summary),
        "## Against the full recompute with the same window, rule and EOS",
        _agreement_table(summary),
        *(f"![{name}]({name})" for name in pictures),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _setting(run: dict[str, Any]) -> list[str]:
    inflated = f" inflated to {run['inflate']}" if run["inflate"] else ""
    return [
        f"model {run['model']}{inflated}, {run['dtype']} on {run['device']}, batch 1",
        f"{run['problems']} held-out problems, {run['repeat']} run(s) of each, in turns",
    ]


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _ratio_table(summary: Summary) -> str:
    names = [figures.cell for figures in summary.figures]
    rows = [[one, *(_ratio(summary.ratios[one].get(other)) for other in names)] for one in names]
    return _markdown_table(["", *names], rows)


def _ratio(estimate: Estimate | None) -> str:
    return "" if estimate is None else _interval(estimate, "{:.2f}")


def _agreement_table(summary: Summary) -> str:
    rows = [
        [
            figures.cell,
            a.reference,
            f"{a.num_problems}",
            f"{a.tokens_equal:.1%}",
            f"{a.num_lost}",
            f"{a.num_won}",
            _interval(_in_points(a.difference), "{:+.1f}"),
        ]
        for figures in summary.figures
        if (a := figures.agreement) is not None
    ]
    header = ("cell", "against", "problems", "tokens equal", "lost", "won", "difference, points")
    return _markdown_table(header, rows) if rows else "No cell has one in this run."


def _in_points(share: Estimate) -> Estimate:
    return Estimate(100 * share.value, 100 * share.low, 100 * share.high)


def as_json(record: Record, summary: Summary, command: str) -> dict[str, Any]:
    """Everything the page says, as numbers."""
    return {
        "command": command,
        "run": record.run,
        "machines": record.machines,
        "cells": [dataclasses.asdict(figures) for figures in summary.figures],
        "ratios": {
            one: {other: dataclasses.asdict(ratio) for other, ratio in others.items()}
            for one, others in summary.ratios.items()
        },
    }
