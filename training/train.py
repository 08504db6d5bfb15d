"""Trains the embedded model: one command, the same weights for the same seed and steps.

The subtle thing is the schedule: the learning rate depends on the step alone (warm up, hold, then
fall linearly to 0 over the second half), never on the clock, and the whole state is kept in
OUT/state.pt. So a run may stop at any time and go on later, and ends with the weights that an
uninterrupted run ends with. README.md says what is known and what is a guess.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic, before torch starts
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's workers are the threads

import elastic_cache
import torch
import torch.nn.functional as F
from batches import BATCHES_PER_POOL, LONGEST, Batch, Pools
from capture import CapturedStep
from decode import Score, score
from network import Network, load_network, read_config, save_network
from problems import held_out, validation, wilson_interval
from tokenizers import Tokenizer
from torch.utils.data import DataLoader

EMBEDDED = Path(elastic_cache.__file__).parent / "data" / "tiny-llada"
WARMUP_STEPS = 200
EMA_DECAY = 0.999
LOG_EVERY, WATCH_EVERY, SAVE_EVERY = 100, 8000, 2000
WATCHED = 128


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the weights depend on, besides the number of steps."""

    seed: int
    batch: int
    from_scratch: bool

    @property
    def peak(self) -> float:
        return 2e-3 if self.from_scratch else 1.5e-3


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up, constant, and from half of the run on linearly to 0."""
    remaining = (steps - step) / max(1.0, steps / 2)
    return peak * min(1.0, (step + 1) / WARMUP_STEPS, remaining)


class Run:
    """Network, its moving average, optimiser and step, and their file."""

    def __init__(self, init: Path, out: Path, settings: Settings, device: torch.device) -> None:
        self.init, self.out, self.settings, self.device = init, out, settings, device
        self.config = read_config(init)
        if settings.from_scratch:
            network = Network(self.config, LONGEST)
            network.initialise(settings.seed)
        else:
            network = load_network(init, LONGEST)
        self.network = network.to(device)
        self.ema = copy.deepcopy(self.network).requires_grad_(False)
        # A tensor, so that a captured step reads the rate of its own time.
        self.rate = torch.tensor(settings.peak, device=device)
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(), lr=self.rate, betas=(0.9, 0.98), weight_decay=0.05,
            fused=device.type == "cuda", capturable=device.type == "cuda",
        )  # fmt: skip
        self._update: Callable[[Batch], torch.Tensor] = self._run_step
        if device.type == "cuda":
            # Block by block: one compilation serves all 32 and, from the second length of a
            # sequence on, every length. The average stays eager, it decodes other shapes.
            for block in self.network.blocks:
                block.compile()
            self._update = CapturedStep(self._run_step, device)
        self.step = 0
        self._state = out / "state.pt"
        if self._state.exists():
            self._resume()

    def _resume(self) -> None:
        state = torch.load(self._state, map_location=self.device, weights_only=True)
        if state["settings"] != dataclasses.asdict(self.settings):
            raise SystemExit(
                f"{self._state} belongs to a run with {state['settings']}, but this one has "
                f"{dataclasses.asdict(self.settings)}: give the same settings or another --out"
            )
        self.network.load_state_dict(state["network"])
        self.ema.load_state_dict(state["ema"])
        self.optimiser.load_state_dict(state["optimiser"])
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate
        self.step = state["step"]

    def save(self) -> None:
        """state.pt, and the checkpoint folder of the moving average as it is now."""
        self.out.mkdir(parents=True, exist_ok=True)
        state = {
            "settings": dataclasses.asdict(self.settings),
            "step": self.step,
            "network": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        unfinished = self._state.with_suffix(".partial")
        torch.save(state, unfinished)
        unfinished.replace(self._state)
        save_network(self.ema, self.out, like=self.init)

    def train_step(self, batch: Batch, steps: int) -> torch.Tensor:
        """One update of weights and average; the loss stays valid until the next step."""
        self.rate.fill_(learning_rate(self.step, steps, self.settings.peak))
        self.step += 1
        return self._update(batch)

    def _run_step(self, batch: Batch) -> torch.Tensor:
        """The part of a step that runs on the device: batch there -> loss."""
        self.optimiser.zero_grad(set_to_none=True)
        is_cuda = self.device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16, enabled=is_cuda, cache_enabled=False):
            logits = self.network(batch.ids, batch.rows)
        losses = F.cross_entropy(logits.float(), batch.targets, reduction="none")
        loss = (losses * batch.weights).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimiser.step()
        average, weights = list(self.ema.parameters()), list(self.network.parameters())
        torch._foreach_lerp_(average, weights, 1 - EMA_DECAY)
        return loss.detach()

    def score(self, pairs: list[tuple[str, str]]) -> Score:
        """Exact match of the moving average, in float32, by full recompute."""
        tokenizer = Tokenizer.from_file(str(self.init / "tokenizer.json"))
        config = self.config
        return score(
            self.ema, tokenizer, pairs,
            mask_id=config["mask_token_id"], eos_id=config["eos_token_id"],
        )  # fmt: skip


def batches(run: Run, steps: int, workers: int) -> Iterator[Batch]:
    """The batches of steps run.step, run.step + 1, ... up to `steps`."""
    settings = run.settings
    pools = Pools(str(run.init / "tokenizer.json"), run.config, settings.batch, settings.seed)
    first, skip = divmod(run.step, BATCHES_PER_POOL)
    last = (steps + BATCHES_PER_POOL - 1) // BATCHES_PER_POOL
    loader = DataLoader(
        pools, sampler=range(first, last), batch_size=None, num_workers=workers,
        prefetch_factor=4 if workers else None, pin_memory=run.device.type == "cuda",
    )  # fmt: skip
    for pool in loader:
        yield from pool[skip:]
        skip = 0


def train(run: Run, steps: int, until: int, minutes: float, workers: int) -> None:
    """Trains up to step `until` of `steps`, or until the minutes are over; saves in either case."""
    start, first = time.monotonic(), run.step
    for batch in batches(run, steps, workers):
        if run.step >= until or time.monotonic() - start > minutes * 60:
            break
        loss = run.train_step(batch, steps)
        if run.step % LOG_EVERY == 0 or run.step == steps:
            pace = (run.step - first) / (time.monotonic() - start)
            left = (steps - run.step) / pace / 60
            print(
                f"step {run.step} of {steps}  loss {loss.item():.4f}  {pace:.1f} steps/s  "
                f"{left:.1f} min left",
                flush=True,
            )
        if run.step % SAVE_EVERY == 0:
            run.save()
        if run.step % WATCH_EVERY == 0:
            report("validation", run.score(validation(WATCHED)))
    run.save()


def report(name: str, result: Score) -> dict[str, Any]:
    low, high = wilson_interval(result.correct, result.count)
    accuracy = result.correct / result.count
    print(
        f"{name}: exact match {accuracy:.1%} of {result.count} (95 %: {low:.1%} to {high:.1%}), "
        f"{result.tokens_per_forward:.2f} tokens per forward",
        flush=True,
    )
    return {
        "problems": result.count,
        "exact_match": accuracy,
        "interval": [low, high],
        "tokens_per_forward": result.tokens_per_forward,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, required=True, help="length of the whole run")
    parser.add_argument("--out", type=Path, required=True, help="folder of state and checkpoint")
    parser.add_argument("--init", type=Path, default=EMBEDDED, help="checkpoint to start from")
    parser.add_argument(
        "--from-scratch", action="store_true",
        help="start from random weights; config and tokenizer still come from --init",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=224, help="samples per step")
    parser.add_argument(
        "--until", type=int, metavar="STEP", help="stop training at this step of --steps",
    )  # fmt: skip
    parser.add_argument(
        "--stop-after", type=float, default=float("inf"), metavar="MINUTES",
        help="stop training then; the same command goes on from OUT/state.pt",
    )  # fmt: skip
    parser.add_argument("--evaluate", type=int, default=500, help="held-out problems at the end")
    parser.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 2) - 2))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    torch.set_float32_matmul_precision("highest")
    # Descriptors of shared tensors would exceed the usual limit of 1,024 open files.
    torch.multiprocessing.set_sharing_strategy("file_system")
    settings = Settings(args.seed, args.batch, args.from_scratch)
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))  # captured steps need one of their own
    run = Run(args.init, args.out, settings, device)
    until = args.steps if args.until is None else min(args.until, args.steps)
    train(run, args.steps, until, args.stop_after, args.workers)
    record = {"steps": run.step, "planned_steps": args.steps, **dataclasses.asdict(settings)}
    if args.evaluate:
        record["held_out"] = report("held out", run.score(held_out(args.evaluate)))
    (args.out / "training.json").write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
