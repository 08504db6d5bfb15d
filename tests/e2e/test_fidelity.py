"""The engine against the oracle, step by step: first refreshed layer, tracked set, commits, tokens.

The oracle computes in float64, the engine in float32. A case whose two runs part is excused only
where the oracle's own decision of that very kind was closer than 1e-5 to its opposite, and only
a few cases may be excused. The matrix must also be worth comparing: a test at the end of each
group counts the refreshes, multi-token commits and EOS events that the oracle saw.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import elastic_cache
import pytest
import torch
from oracle.checkpoint import Shape, write_checkpoint
from oracle.generate import Options, Result, generate
from oracle.model import OracleModel, load_model
from tokenizers import Tokenizer

NEAR_TIE = 1e-5
GAMMAS = (0.0, 0.9, 0.99, 0.999, 2.0)
WINDOWS = (1, 8, 16, 64, 200)

SHAPES = {
    "1 layer, 1 head": Shape(1, 1, 1, head_dim=32, seed=1),
    "1 layer, 4 heads": Shape(1, 4, 4, head_dim=8, seed=2),
    "2 layers, 2 heads on 1": Shape(2, 2, 1, head_dim=16, seed=3),
    "3 layers, 6 heads on 3, llama names": Shape(3, 6, 3, head_dim=8, seed=4, names="llama"),
    "5 layers, 8 heads on 2, tied": Shape(5, 8, 2, head_dim=8, seed=5, is_tied=True),
    "8 layers, 4 heads, 3 shards": Shape(8, 4, 4, head_dim=16, seed=6, shards=3),
    "2 layers, 3 heads of 20": Shape(2, 3, 3, head_dim=20, seed=7, intermediate=52),
    "2 layers, 2 heads of 128": Shape(2, 2, 2, head_dim=128, seed=8, score_gain=4.0),
    "33 layers, 4 heads on 2": Shape(33, 4, 2, head_dim=16, seed=9),
}
EMBEDDED = "tiny"
QUESTIONS = (
    "Kira has 55 coins. Then Kira gives away 25 coins. How many coins does Kira have now?",
    "Sam has 84 apples. Yuri has 15 more apples than 22 and gives all of them to Sam. Then Sam "
    "buys 5 crates with 5 apples in each crate. How many apples does Sam have now?",
)


@dataclass(frozen=True)
class Case:
    """One request: a checkpoint (a key of SHAPES, or the embedded one), prompt ids, options."""

    checkpoint: str | Shape
    prompt: tuple[int, ...]
    options: Options

    def __str__(self) -> str:
        name = self.checkpoint
        if isinstance(name, Shape):
            name = f"Shape({said(name, Shape(0, 0, 0))})"
        return f"{name}: {len(self.prompt)} prompt ids, {said(self.options, Options(0))}"


def said(value: Shape | Options, default: Shape | Options) -> str:
    """The fields of `value` that differ from `default`."""
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return ", ".join(f"{k}={v}" for k, v in fields.items() if v != getattr(default, k))


@dataclass(frozen=True)
class Divergence:
    """Where the two runs part; `margin` is the oracle's for the kind of decision that differs."""

    step: int
    quantity: str
    oracle: object
    engine: object
    margin: float

    def __str__(self) -> str:
        return (
            f"step {self.step}, {self.quantity}: the oracle has {self.oracle}, the engine "
            f"{self.engine} (oracle's margin {self.margin:.2e})"
        )


@contextmanager
def one_thread() -> Iterator[None]:
    """These matrices are too small to share: on a busy machine two threads cost 50 times one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Lab:
    """Loads checkpoints and runs cases, each once for all the tests that look at it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loaded: dict[str | Shape, tuple[OracleModel, elastic_cache.Engine]] = {}
        self.results: dict[Case, tuple[Result, Divergence | None]] = {}

    def load(self, checkpoint: str | Shape) -> tuple[OracleModel, elastic_cache.Engine]:
        if checkpoint not in self.loaded:
            if checkpoint == EMBEDDED:
                folder = Path(elastic_cache.__file__).parent / "data" / "tiny-llada"
                name = EMBEDDED
            else:
                shape = SHAPES[checkpoint] if isinstance(checkpoint, str) else checkpoint
                folder = write_checkpoint(self.folder / str(len(self.loaded)), shape)
                name = str(folder)
            engine = elastic_cache.load(name, device="cpu", dtype="float32")
            self.loaded[checkpoint] = load_model(folder, torch.float64), engine
        return self.loaded[checkpoint]

    def run(self, case: Case) -> tuple[Result, Divergence | None]:
        if case not in self.results:
            model, engine = self.load(case.checkpoint)
            with one_thread():
                want = generate(model, list(case.prompt), case.options)
                got = engine.generate(
                    list(case.prompt), trace=True, **dataclasses.asdict(case.options)
                )
            self.results[case] = want, first_divergence(want, got)
        return self.results[case]

    def check(self, case: Case) -> None:
        divergence = self.run(case)[1]
        if divergence is not None and not divergence.margin < NEAR_TIE:
            pytest.fail(f"{case}\n{divergence}", pytrace=False)


def first_divergence(want: Result, got: elastic_cache.Generation) -> Divergence | None:
    assert got.trace is not None
    for i, (step, seen) in enumerate(zip(want.steps, got.trace, strict=False)):
        margins = step.margins
        pairs = (
            ("first_full_layer", step.first_full_layer, seen.first_full_layer, margins.drift),
            ("tracked", step.tracked, list(seen.tracked), margins.tracked),
            ("committed", step.committed, list(seen.committed), margins.commit),
            ("tokens", step.tokens, list(seen.tokens), margins.token),
        )
        for quantity, oracle, engine, margin in pairs:
            if oracle != engine:
                return Divergence(i, quantity, oracle, engine, margin)
    frequency = round(want.update_frequency, 9), round(got.update_frequency, 9)
    totals = (
        ("nfe", want.nfe, got.nfe),
        ("number of trace entries", want.nfe, len(got.trace)),
        ("ids", want.ids.tolist(), got.ids.tolist()),
        ("num_tokens", want.num_tokens, got.num_tokens),
        ("update_frequency", *frequency),
    )
    for quantity, whole, seen_whole in totals:
        if whole != seen_whole:
            return Divergence(want.nfe, quantity, whole, seen_whole, float("inf"))
    return None


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("fidelity"))


# ---- cases -----------------------------------------------------------------------------------


def random_prompt(length: int, seed: int, vocab: int = 72) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(8, vocab) for _ in range(length))


def with_holes(length: int, seed: int) -> tuple[int, ...]:
    """A prompt that already has masks (id 3): a run of them, and every fourth place further on."""
    ids = list(random_prompt(length, seed))
    for i in [*range(5, 14), *range(18, length, 4)]:
        ids[i] = Shape(1, 1, 1).mask_id
    return tuple(ids)


def elastic_matrix(names: list[str], gen_length: int, seed: int) -> list[Case]:
    cases = []
    for name in names:
        for window in WINDOWS:
            for gamma in GAMMAS:
                # Window 64 must be smaller than the answer, 200 larger than it.
                length = 80 if window == 64 else gen_length
                prompt = random_prompt(5 + (seed + window) % 23, seed)
                cases.append(Case(name, prompt, Options(length, window=window, gamma=gamma)))
    return cases


SMALL = [name for name in SHAPES if not name.startswith("33")]
ELASTIC = elastic_matrix(SMALL, 40, seed=1) + [
    case
    for case in elastic_matrix(["33 layers, 4 heads on 2"], 20, seed=2)
    if (case.options.window, case.options.gamma)
    in {(1, 0.9), (8, 0.99), (16, 0.9), (16, 0.999), (64, 0.0), (200, 0.9), (200, 2.0)}
]
# Between 0.8 and 0.97 the test fails at many depths, where 0.99 already fails at layer 0.
DEEP = [name for name in SHAPES if name[0] in "358"] + ["33 layers, 4 heads on 2"]
DEPTHS = [
    Case(name, random_prompt(12, window), Options(gen_length, window=window, gamma=gamma))
    for name in DEEP
    for gen_length in (24 if name.startswith("33") else 48,)
    for window in (8, 16, 32)
    for gamma in (0.8, 0.95, 0.97)
]
# (seed, a token that this checkpoint is fond of somewhere in mid-answer): that token as EOS.
FOND_OF = ((20, 34), (23, 37), (25, 52), (26, 30), (28, 27), (31, 69))
ENDINGS = [
    Case(Shape(4, 4, 2, seed=seed, eos_id=token), random_prompt(12, seed), options)
    for seed, token in FOND_OF
    for options in (
        Options(48, window=6, gamma=0.9),
        Options(48, window=6, gamma=0.97, track_num=2),
        Options(48, window=16, gamma=0.97),
        Options(48, window=16, gamma=0.9, block_caching=False),
        Options(48, window=60, gamma=0.99),
        Options(48, policy="none"),
        Options(48, policy="prefix", block_length=16),
        Options(48, policy="dual", block_length=32),
        Options(48, policy="rolling", window=6, num_rows=20),
    )
]
MIDDLE = ["2 layers, 2 heads on 1", "5 layers, 8 heads on 2, tied", "8 layers, 4 heads, 3 shards"]
VARIANTS = {
    "every mask a row": Options(40, block_caching=False, window=8, gamma=0.95),
    "every mask a row, gamma 0.99": Options(40, block_caching=False, window=5, gamma=0.99),
    "three tracked": Options(40, track_num=3, window=8, gamma=0.95),
    "three tracked, every mask": Options(40, track_num=3, block_caching=False, window=8),
    "one a step": Options(30, tokens_per_step=1, window=8, gamma=0.95),
    "three a step": Options(40, tokens_per_step=3, window=8, gamma=0.99),
    "more a step than the window": Options(40, tokens_per_step=9, window=4, gamma=0.95),
    "factor 0.5": Options(40, factor=0.5, gamma=0.95),
    "factor 2": Options(40, factor=2.0, gamma=0.9),
    "threshold 0": Options(40, threshold=0.0, window=7, gamma=0.95),
    "threshold 0.4": Options(40, threshold=0.4, gamma=0.97),
    "threshold 1": Options(24, threshold=1.0, window=12, gamma=0.9),
}
OTHERS = {
    "none": Options(40, policy="none"),
    "none, window 5": Options(40, policy="none", window=5, threshold=0.6),
    "none, window 100": Options(40, policy="none", window=100, tokens_per_step=4),
    "prefix": Options(70, policy="prefix"),
    "prefix, blocks of 8": Options(45, policy="prefix", block_length=8, threshold=0.7),
    "prefix, factor": Options(45, policy="prefix", block_length=16, factor=1.0),
    "prefix, steps": Options(48, policy="prefix", block_length=16, steps=15),
    "dual": Options(70, policy="dual"),
    "dual, blocks of 8": Options(45, policy="dual", block_length=8, threshold=0.7),
    "dual, one block": Options(40, policy="dual", block_length=64),
    "dual, factor": Options(45, policy="dual", block_length=16, factor=1.0),
    "dual, steps": Options(48, policy="dual", block_length=16, steps=15),
    "dual, two a step": Options(40, policy="dual", block_length=8, tokens_per_step=2),
    "rolling, the window alone": Options(40, policy="rolling", window=8, num_rows=8),
    "rolling": Options(40, policy="rolling", window=8, num_rows=20),
    "rolling, threshold 0.4": Options(60, policy="rolling", num_rows=24, threshold=0.4),
    "rolling, nearly all": Options(40, policy="rolling", window=5, num_rows=45),
    "rolling, three a step": Options(40, policy="rolling", num_rows=17, tokens_per_step=3),
}
INFILLING = {
    "elastic": Options(0, window=6, gamma=0.95),
    "elastic and an answer": Options(12, window=6, gamma=0.9),
    "elastic, every mask a row": Options(12, window=4, block_caching=False, track_num=2),
    "none": Options(8, policy="none", window=6),
    "prefix": Options(8, policy="prefix", block_length=8),
    "dual": Options(8, policy="dual", block_length=8),
    "dual, no answer": Options(0, policy="dual", block_length=7),
    "rolling": Options(8, policy="rolling", window=6, num_rows=14),
}


def variant_cases(variants: dict[str, Options], is_infilling: bool = False) -> list[Case]:
    return [
        Case(name, (with_holes if is_infilling else random_prompt)(11 + 18 * is_infilling, i), o)
        for name in MIDDLE
        for i, o in enumerate(variants.values())
    ]


def embedded_cases() -> list[Case]:
    folder = Path(elastic_cache.__file__).parent / "data" / "tiny-llada"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    options = [
        [Options(64, gamma=0.99), Options(64, gamma=0.9, window=8), Options(24, policy="none")],
        [
            Options(80, gamma=0.995, track_num=2),
            Options(64, policy="dual"),
            Options(64, policy="rolling", num_rows=32),
        ],
    ]
    return [
        Case(EMBEDDED, tuple(tokenizer.encode(chat(question)).ids), option)
        for question, some in zip(QUESTIONS, options, strict=True)
        for option in some
    ]


def chat(question: str) -> str:
    return (
        f"<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def random_cases(count: int, seed: int) -> list[Case]:
    """Checkpoints, prompts and options drawn together, all policies."""
    rng = random.Random(seed)
    cases = []
    for i in range(count):
        kv_heads = rng.choice((1, 2, 3))
        shape = Shape(
            layers=rng.choice((1, 2, 3, 4, 6, 9, 13)),
            heads=kv_heads * rng.choice((1, 2, 4)),
            kv_heads=kv_heads,
            head_dim=rng.choice((8, 16, 32)),
            seed=1000 + i,
            names=rng.choice(("llada", "llama")),
            score_gain=rng.choice((2.0, 3.0, 4.0)),
            logit_gain=rng.choice((5.0, 7.0)),
        )
        rules: tuple[dict[str, Any], ...] = (
            {},
            {},
            {},
            {"tokens_per_step": rng.randint(1, 5)},
            {"factor": rng.choice((0.5, 1.5))},
        )
        policy = rng.choice(("elastic",) * 5 + ("none", "prefix", "dual", "rolling"))
        window = rng.choice((1, 3, 8, 16, 33, 64))
        options = Options(
            gen_length=rng.randint(8, 60),
            policy=policy,
            window=window,
            num_rows=window + rng.choice((0, 5, 30)),
            gamma=rng.choice((0.9, 0.95, 0.98, 0.99, 0.999)),
            threshold=rng.choice((0.3, 0.6, 0.9, 0.95)),
            track_num=rng.choice((1, 1, 2, 4)),
            block_caching=policy == "rolling" or rng.random() < 0.7,
            block_length=rng.choice((5, 8, 32)),
            **rng.choice(rules),
        )
        length = rng.randint(4, 40)
        prompt = with_holes(length + 20, i) if rng.random() < 0.3 else random_prompt(length, i)
        cases.append(Case(shape, prompt, options))
    return cases


GROUPS = {
    "elastic": ELASTIC,
    "depths": DEPTHS,
    "endings": ENDINGS,
    "variants": variant_cases(VARIANTS),
    "others": variant_cases(OTHERS),
    "infilling": variant_cases(INFILLING, is_infilling=True),
    "embedded": embedded_cases(),
}
EVERYTHING = [case for group in GROUPS.values() for case in group]
SLOW = elastic_matrix(["33 layers, 4 heads on 2"], 24, seed=5) + random_cases(400, seed=1)


# ---- tests -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ELASTIC + DEPTHS, ids=str)
def test_elastic(lab: Lab, case: Case) -> None:
    lab.check(case)


@pytest.mark.parametrize("case", ENDINGS, ids=str)
def test_endings(lab: Lab, case: Case) -> None:
    lab.check(case)


@pytest.mark.parametrize("case", GROUPS["variants"], ids=str)
def test_options_of_elastic(lab: Lab, case: Case) -> None:
    lab.check(case)


@pytest.mark.parametrize("case", GROUPS["others"], ids=str)
def test_other_policies(lab: Lab, case: Case) -> None:
    lab.check(case)


@pytest.mark.parametrize("case", GROUPS["infilling"], ids=str)
def test_infilling(lab: Lab, case: Case) -> None:
    lab.check(case)


@pytest.mark.parametrize("case", GROUPS["embedded"], ids=str)
def test_embedded_model(lab: Lab, case: Case) -> None:
    lab.check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=str)
def test_sweep(lab: Lab, case: Case) -> None:
    lab.check(case)


def test_two_threads_take_the_same_path(lab: Lab) -> None:
    """The rest of the file runs on one thread."""
    case = Case("3 layers, 6 heads on 3, llama names", random_prompt(9, 3), Options(12, gamma=0.95))
    model, engine = lab.load(case.checkpoint)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        got = engine.generate(list(case.prompt), trace=True, **dataclasses.asdict(case.options))
    finally:
        torch.set_num_threads(before)
    divergence = first_divergence(generate(model, list(case.prompt), case.options), got)
    assert divergence is None, str(divergence)


def excused(lab: Lab, cases: list[Case]) -> list[str]:
    found = ((case, lab.run(case)[1]) for case in cases)
    return [f"{case}: {d}" for case, d in found if d is not None and d.margin < NEAR_TIE]


def test_few_cases_are_excused(lab: Lab) -> None:
    found = excused(lab, EVERYTHING)
    assert len(found) <= len(EVERYTHING) // 50, "\n".join(found)


@pytest.mark.slow
def test_few_cases_of_the_sweep_are_excused(lab: Lab) -> None:
    found = excused(lab, SLOW)
    assert len(found) <= len(SLOW) // 50, "\n".join(found)


def test_the_matrix_is_worth_comparing(lab: Lab) -> None:
    """Counts what the oracle went through; a matrix of trivial runs would prove nothing."""
    results = [lab.run(case)[0] for case in ELASTIC + DEPTHS + ENDINGS]
    steps = [(r.num_layers, s) for r in results for s in r.steps[1:]]
    partial = [s.first_full_layer for n, s in steps if 1 < s.first_full_layer < n]
    assert len(partial) >= 300, "refreshes that begin after the second layer"
    assert len(set(partial)) >= 15, "depths at which a refresh begins"
    assert sum(s.first_full_layer == 1 < n for n, s in steps) >= 1000, "refreshes after layer 0"
    assert sum(s.first_full_layer == n for n, s in steps) >= 1000, "steps without a refresh"
    assert sum(len(s.committed) > 1 for _, s in steps) >= 700, "steps that commit several tokens"
    assert sum(len(s.tracked) > 1 for _, s in steps) >= 1000, "steps that track several tokens"
    ended = [r for r in results if r.eos_position is not None]
    assert len(ended) >= 45, "runs that an EOS ended"


def test_special_events_occur(lab: Lab) -> None:
    """Rare paths that some case must take, each easy to get wrong unseen."""
    seen = set()
    for case in EVERYTHING:
        result = lab.run(case)[0]
        if case.checkpoint == EMBEDDED or result.eos_position is None:
            continue
        cut = result.eos_position
        eos = int(result.ids[cut])
        at = next(i for i, s in enumerate(result.steps) if eos in s.tokens)
        if any(p < cut for s in result.steps[at + 1 :] for p in s.committed):
            seen.add("masks left of the EOS decoded after it")
        if any(p > cut for s in result.steps[: at + 1] for p in s.committed):
            seen.add("a token right of the EOS committed no later than it")
        masks = {i for i, t in enumerate(case.prompt) if t == 3} | set(
            range(len(case.prompt), len(result.ids))
        )
        dropped = {p for p in masks if p > cut} - {p for s in result.steps for p in s.committed}
        if any(set(s.tracked) & dropped for s in result.steps):
            seen.add("a dropped mask tracked")
    if any(3 in s.tokens for case in EVERYTHING for s in lab.run(case)[0].steps):
        seen.add("the mask token committed")
    assert seen == {
        "masks left of the EOS decoded after it",
        "a token right of the EOS committed no later than it",
        "a dropped mask tracked",
        "the mask token committed",
    }
