"""Exact match on the held-out problems through the public API, with a confidence interval.

The figures that are published for the embedded model come from this script: full recompute
(policy none), window 16, threshold 0.9, gen_length 256, 500 problems.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import elastic_cache
from elastic_cache.problems import HELD_OUT_SEED, final_number
from problems import held_out, wilson_interval


def evaluate(args: argparse.Namespace) -> dict:
    """Decodes every problem; one line of progress per problem on stderr."""
    engine = elastic_cache.load(args.model, device=args.device, dtype=args.dtype)
    settings = {"gen_length": 256, "policy": args.policy, "window": 16, "threshold": 0.9}
    if args.policy == "elastic":
        settings["gamma"] = args.gamma
    correct = num_tokens = num_forwards = 0
    pairs = held_out(args.problems)
    start = time.monotonic()
    for done, (question, answer) in enumerate(pairs, 1):
        out = engine.generate(question, **settings)
        correct += final_number(out.text) == final_number(answer)
        num_tokens += out.num_tokens
        num_forwards += out.nfe
        left = (time.monotonic() - start) / done * (len(pairs) - done) / 60
        print(
            f"\r{done} of {len(pairs)}  exact match {correct / done:.1%}  "
            f"{num_tokens / num_forwards:.2f} tokens per forward  {left:.0f} min left   ",
            end="\n" if done == len(pairs) else "",
            file=sys.stderr,
            flush=True,
        )
    return {
        "model": args.model,
        "device": args.device,
        "dtype": args.dtype,
        "held_out_seed": HELD_OUT_SEED,
        "problems": len(pairs),
        **settings,
        "correct": correct,
        "exact_match": correct / len(pairs),
        "exact_match_95_percent": list(wilson_interval(correct, len(pairs))),
        "tokens_per_forward": num_tokens / num_forwards,
        "mean_tokens": num_tokens / len(pairs),
        "seconds": time.monotonic() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--policy", default="none", help="none, prefix, dual or elastic")
    parser.add_argument("--gamma", type=float, default=0.9, help="for the policy elastic")
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--json", type=Path, help="write the result to this file as well")
    args = parser.parse_args()
    if args.problems < 1:
        parser.error(f"--problems must be at least 1, got {args.problems}")
    result = json.dumps(evaluate(args), indent=1)
    print(result)
    if args.json:
        args.json.write_text(result + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
