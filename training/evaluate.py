"""Exact match on the held-out problems through the public API, with a confidence interval.

The figures that are published for the embedded model come from this script: full recompute
(policy none), window 16, threshold 0.9, gen_length 256, 500 problems.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from multiprocessing import Queue, get_context
from pathlib import Path
from queue import Empty

import elastic_cache
import torch
from elastic_cache.problems import HELD_OUT_SEED, final_number
from problems import held_out, wilson_interval


def answer(engine: elastic_cache.Engine, settings: dict, index: int, pair: tuple) -> dict:
    """One problem: whether the answer is right, its tokens and the forwards it took."""
    question, expected = pair
    out = engine.generate(question, **settings)
    return {
        "index": index,
        "correct": final_number(out.text) == final_number(expected),
        "num_tokens": out.num_tokens,
        "nfe": out.nfe,
    }


def work(args: argparse.Namespace, settings: dict, share: int, results: Queue) -> None:
    """A process of its own, with one thread: problems share, share + jobs, ..."""
    torch.set_num_threads(1)
    engine = elastic_cache.load(args.model, device=args.device, dtype=args.dtype)
    for index, pair in list(enumerate(held_out(args.problems)))[share :: args.jobs]:
        results.put(answer(engine, settings, index, pair))


def run_all(args: argparse.Namespace, settings: dict) -> Iterator[dict]:
    """The answers as they come; from this process, or from `jobs` of them."""
    if args.jobs == 1:
        engine = elastic_cache.load(args.model, device=args.device, dtype=args.dtype)
        for index, pair in enumerate(held_out(args.problems)):
            yield answer(engine, settings, index, pair)
        return
    context = get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(target=work, args=(args, settings, share, results), daemon=True)
        for share in range(args.jobs)
    ]
    for worker in workers:
        worker.start()
    for _ in range(args.problems):
        while True:
            try:
                yield results.get(timeout=5)
                break
            except Empty:
                if any(worker.exitcode for worker in workers):
                    sys.exit("a process of the evaluation died; its message stands above")


def evaluate(args: argparse.Namespace) -> dict:
    """Decodes every problem; a line of progress on stderr."""
    settings = {"gen_length": 256, "policy": args.policy, "window": 16, "threshold": 0.9}
    if args.policy == "elastic":
        settings["gamma"] = args.gamma
    start, answers = time.monotonic(), []
    for done in run_all(args, settings):
        answers.append(done)
        count = len(answers)
        left = (time.monotonic() - start) / count * (args.problems - count) / 60
        print(
            f"\r{count} of {args.problems}  exact match {total(answers, 'correct') / count:.1%}  "
            f"{total(answers, 'num_tokens') / total(answers, 'nfe'):.2f} tokens per forward  "
            f"{left:.0f} min left   ",
            end="\n" if count == args.problems else "",
            file=sys.stderr,
            flush=True,
        )
    correct = total(answers, "correct")
    return {
        "model": args.model,
        "device": args.device,
        "dtype": args.dtype,
        "held_out_seed": HELD_OUT_SEED,
        "problems": args.problems,
        **settings,
        "correct": correct,
        "exact_match": correct / args.problems,
        "exact_match_95_percent": list(wilson_interval(correct, args.problems)),
        "tokens_per_forward": total(answers, "num_tokens") / total(answers, "nfe"),
        "mean_tokens": total(answers, "num_tokens") / args.problems,
        "seconds": time.monotonic() - start,
        "wrong": sorted(done["index"] for done in answers if not done["correct"]),
    }


def total(answers: list[dict], name: str) -> int:
    return sum(done[name] for done in answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--policy", default="none", help="none, prefix, dual or elastic")
    parser.add_argument("--gamma", type=float, default=0.9, help="for the policy elastic")
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with one thread")
    parser.add_argument("--json", type=Path, help="write the result to this file as well")
    args = parser.parse_args()
    for name in ("problems", "jobs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    result = json.dumps(evaluate(args), indent=1)
    print(result)
    if args.json:
        args.json.write_text(result + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
