"""How far a policy's decisions are from full recompute's: on the same tokens, in every step.

    python benchmarks/agreement.py [--policies rolling,rolling:num_rows=64] [--reach N ...]

Exact match needs hundreds of problems for a difference of a point; this sees thousands of decisions
in each. The embedded model answers held-out problems by policy `none`. Then every cell goes through
the same steps: it decodes as it does, is compared, and has to commit what `none` committed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import elastic_cache
import torch
from elastic_cache.batch import Batch
from elastic_cache.config import GenerationConfig
from elastic_cache.decoding import Decoder
from elastic_cache.engine import runner_shape
from elastic_cache.lab.cells import read_cells
from elastic_cache.models.weights import Model
from elastic_cache.plan import RollingRule
from elastic_cache.policies import make_policy
from elastic_cache.policies.rolling import RollingPolicy
from elastic_cache.problems import HELD_OUT_SEED, problems
from elastic_cache.prompt import encode_prompt
from elastic_cache.runner import Runner
from rich.progress import track

POLICIES = ("none", "elastic", "rolling")  # they decode the same positions

Decoded = tuple[torch.Tensor, torch.Tensor]  # tokens and confidences of a step's candidates


@dataclass
class Counts:
    """What a cell did differently; `candidates` and `commits` are how many there were."""

    candidates: int = 0
    commits: int = 0
    other_token: int = 0  # candidates for which it saw another best token
    confidence_off: float = 0.0  # sum over candidates
    wrong: int = 0  # commits of another token than full recompute's best
    early: int = 0  # commits that full recompute would not have made in this step
    late: int = 0  # commits of full recompute's that it would not have made

    def add(self, mine: Decoded, truth: Decoded, threshold: float) -> None:
        is_other = mine[0] != truth[0]
        mine_commits, true_commits = (
            confidence >= min(threshold, float(confidence.max())) for _, confidence in (mine, truth)
        )
        self.candidates += len(is_other)
        self.commits += int(mine_commits.sum())
        self.other_token += int(is_other.sum())
        self.confidence_off += float((mine[1] - truth[1]).abs().sum())
        self.wrong += int((mine_commits & is_other).sum())
        self.early += int((mine_commits & ~true_commits).sum())
        self.late += int((true_commits & ~mine_commits).sum())

    def rates(self) -> dict[str, float]:
        """Per 1,000 commits or candidates."""
        commits, candidates = self.commits / 1e3, self.candidates / 1e3
        return {
            "wrong": self.wrong / commits,
            "early": self.early / commits,
            "late": self.late / commits,
            "other_token": self.other_token / candidates,
            "confidence_off": self.confidence_off / candidates,
        }


class Listener:
    """In place of a runner's decoder: keeps what it decodes, and puts a lesson's in its place."""

    def __init__(self, decoder: Decoder, lesson: list[Decoded] | None) -> None:
        self._decoder = decoder
        self._lesson: Iterator[Decoded] | None = None if lesson is None else iter(lesson)
        self.heard: list[Decoded] = []
        self.start, self.draw, self.samples = decoder.start, decoder.draw, decoder.samples

    def decode(
        self,
        hidden: torch.Tensor,
        noise: torch.Tensor | None,
        parts: Sequence[int],
        token: torch.Tensor,
        confidence: torch.Tensor,
    ) -> None:
        self._decoder.decode(hidden, noise, parts, token, confidence)
        self.heard.append((token.clone(), confidence.clone()))
        if self._lesson is not None:
            for mine, taught in zip((token, confidence), next(self._lesson), strict=True):
                mine.copy_(taught)


def decode(
    model: Model,
    question: str,
    settings: GenerationConfig,
    rule: RollingRule,
    lesson: list[Decoded] | None,
) -> list[Decoded]:
    """What the request decoded in every step; it commits the lesson if there is one.

    One of `rolling` chooses its rows by `rule`.
    """
    prompt = encode_prompt(model, question, settings.gen_length)
    policy = make_policy(prompt.masked.tolist(), settings, model.config.eos_id)
    shape = runner_shape(model, policy, settings, len(prompt.ids))
    if shape.rolling is not None:
        shape = replace(shape, rolling=rule)
    runner = Runner(model, shape, None)
    runner._decoder = listener = Listener(runner._decoder, lesson)
    for _ in Batch(model, runner, is_alone=True).begin(prompt, settings, policy):
        pass
    return listener.heard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policies", default="rolling", help="cells of rolling and elastic")
    parser.add_argument("--problems", type=int, default=80)
    for name, default in asdict(RollingPolicy.rolling).items():
        text = f"of ops.rolling_rows (default {default})"
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    rule = RollingRule(options.ahead, options.repeats, options.reach)
    cells = read_cells(options.policies, {"gen_length": 256})
    full = GenerationConfig(policy="none", gen_length=256)
    if any(c.policy not in POLICIES or c.full_recompute() != full for c in cells):
        raise SystemExit(f"cells must be of {' or '.join(POLICIES)}, with the default window and "
                         "commit rule")  # fmt: skip
    model = elastic_cache.load("tiny").model
    counts = {cell.name: Counts() for cell in cells}
    for question, _ in track(problems(HELD_OUT_SEED, options.problems), "problems"):
        lesson = decode(model, question, full, rule, None)
        for cell in cells:
            heard = decode(model, question, cell.settings, rule, lesson)
            for mine, truth in zip(heard, lesson, strict=True):
                counts[cell.name].add(mine, truth, full.threshold)
    rates = {name: count.rates() for name, count in counts.items()}
    print(f"{'of 1,000 commits, of 1,000 candidates':<40}", *next(iter(rates.values())))
    for name, row in rates.items():
        print(f"{name:<40}", "  ".join(f"{rate:.2f}" for rate in row.values()))
    if options.json is not None:
        result = {
            "command": " ".join(["benchmarks/agreement.py", *sys.argv[1:]]),
            "torch": torch.__version__,
            "rule": asdict(rule),
            "counts": {name: asdict(count) for name, count in counts.items()},
            "rates": rates,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
