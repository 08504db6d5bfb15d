"""The training recipe: reproducible, resumable, with the masks it says it makes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from elastic_cache.models.checkpoint import EMBEDDED
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
MASK, EOS, EOT, VOCAB = 2, 1, 5, 768


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The networks here are so small that threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The modules of training/, imported as its scripts import one another."""
    monkeypatch.syspath_prepend(str(ROOT / "training"))
    names = ("problems", "batches", "capture", "network", "decode", "train")
    return {name: import_module(name) for name in names}


def small_checkpoint(folder: Path, **config: Any) -> Path:
    write_checkpoint(
        folder, num_layers=2, num_heads=2, head_dim=8, ffn=32, vocab=VOCAB, seed=1,
        mask_token_id=MASK, eos_token_id=EOS, eot_token_id=EOT, max_sequence_length=1024, **config,
    )  # fmt: skip
    shutil.copy(EMBEDDED["tiny"] / "tokenizer.json", folder)
    return folder


def run_script(init: Path, out: Path, *arguments: str) -> dict[str, torch.Tensor]:
    command = [
        sys.executable, str(ROOT / "training" / "train.py"), "--init", str(init), "--out", str(out),
        "--batch", "4", "--steps", "3", "--evaluate", "0", "--device", "cpu", *arguments,
    ]  # fmt: skip
    environment = {"PYTHONPATH": str(ROOT / "python"), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return load_file(out / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_equal_seeds_give_equal_weights(tmp_path: Path) -> None:
    init = small_checkpoint(tmp_path / "init")
    first = run_script(init, tmp_path / "a", "--workers", "0")
    assert same(first, run_script(init, tmp_path / "b", "--workers", "1"))
    assert not same(first, run_script(init, tmp_path / "c", "--workers", "0", "--seed", "1"))
    start = {k: v.bfloat16() for k, v in load_file(init / "model.safetensors").items()}
    assert not same(first, start)
    record = json.loads((tmp_path / "a" / "training.json").read_text())
    assert (record["steps"], record["seed"], record["batch"]) == (3, 0, 4)
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (init / name).read_bytes()


def test_until_stops_at_a_step(tmp_path: Path) -> None:
    init = small_checkpoint(tmp_path / "init")
    whole = run_script(init, tmp_path / "whole", "--workers", "0")
    part = run_script(init, tmp_path / "parts", "--workers", "0", "--until", "2")
    assert json.loads((tmp_path / "parts" / "training.json").read_text())["steps"] == 2
    assert not same(part, whole)
    assert same(run_script(init, tmp_path / "parts", "--workers", "0"), whole)


def test_parallel_evaluation_is_the_serial_one(tmp_path: Path) -> None:
    """Processes change the time and nothing else."""
    results = []
    for jobs in ("1", "2"):
        command = [
            sys.executable, str(ROOT / "training" / "evaluate.py"), "--problems", "2",
            "--policy", "dual", "--jobs", jobs, "--json", str(tmp_path / "out.json"),
        ]  # fmt: skip
        environment = {"PYTHONPATH": str(ROOT / "python"), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=environment, check=True, capture_output=True)
        results.append(json.loads((tmp_path / "out.json").read_text()))
        assert results[-1].pop("seconds") > 0
    assert results[0] == results[1]


@pytest.mark.parametrize("stop", [3, 8])
def test_an_interrupted_run_ends_with_the_same_weights(
    tmp_path: Path, scripts: dict[str, ModuleType], stop: int
) -> None:
    train, steps = scripts["train"], 9
    init = small_checkpoint(tmp_path / "init")
    settings = train.Settings(seed=3, batch=2, from_scratch=True)

    def go(out: Path, until: int) -> Any:
        run = train.Run(init, out, settings, torch.device("cpu"))
        for batch in train.batches(run, steps, workers=0):
            if run.step >= until:
                break
            run.train_step(batch, steps)
        run.save()
        return run

    whole = go(tmp_path / "whole", steps)
    go(tmp_path / "parts", stop)
    parts = go(tmp_path / "parts", steps)
    assert parts.step == whole.step == steps
    assert same(whole.network.state_dict(), parts.network.state_dict())
    assert same(whole.ema.state_dict(), parts.ema.state_dict())


def test_a_state_of_another_run_is_refused(tmp_path: Path, scripts: dict[str, ModuleType]) -> None:
    train = scripts["train"]
    init, device = small_checkpoint(tmp_path / "init"), torch.device("cpu")
    train.Run(init, tmp_path / "out", train.Settings(0, 2, False), device).save()
    with pytest.raises(SystemExit, match="give the same settings or another --out"):
        train.Run(init, tmp_path / "out", train.Settings(1, 2, False), device)


def test_learning_rate(scripts: dict[str, ModuleType]) -> None:
    rate = scripts["train"].learning_rate
    rates = [rate(step, 1000, 2.0) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and min(rates) > 0
    assert rates[199:501] == [2.0] * 302
    assert rates[750] == pytest.approx(1.0) and rates[999] == pytest.approx(0.004)


def pools(scripts: dict[str, ModuleType], batch_size: int, seed: int = 0) -> Any:
    config = {"eos_token_id": EOS, "mask_token_id": MASK, "eot_token_id": EOT}
    path = str(EMBEDDED["tiny"] / "tokenizer.json")
    return scripts["batches"].Pools(path, config, batch_size, seed)


def test_pools_depend_on_seed_and_index_alone(scripts: dict[str, ModuleType]) -> None:
    made = pools(scripts, 3)
    later, first = made[5], pools(scripts, 3)[5]
    assert len(first) == 8
    for a, b in zip(later, first, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    for other in (made[6], pools(scripts, 3, seed=1)[5]):
        assert other[0].ids.shape != first[0].ids.shape or not other[0].ids.equal(first[0].ids)


def test_masks(scripts: dict[str, ModuleType]) -> None:
    """A quarter masked uniformly; the rest: visible, then a window with targets, then masks."""
    num_rows = 16
    for batch in pools(scripts, num_rows)[0]:
        n = batch.ids.shape[1]
        assert n % 32 == 0 and n <= scripts["batches"].LONGEST
        hidden = batch.ids == MASK
        assert hidden.flatten()[batch.rows].all(), "a target is visible"
        assert (batch.targets != MASK).all()
        target = torch.zeros(num_rows * n, dtype=torch.bool)
        target[batch.rows] = True
        target = target.view(num_rows, n)
        assert torch.equal(target[:4], hidden[:4])
        for row in range(4, num_rows):
            first = int(hidden[row].nonzero()[0])
            behind = n - int(hidden[row].flip(0).int().argmin())  # first of the masks at the end
            positions = target[row].nonzero().squeeze(1)
            assert positions.numel() == 0 or positions.max() - first < 32
            assert (hidden[row] & ~target[row])[: max(first, behind - 32)].sum() == 0
        ends = (batch.ids[:4] == 4).int().argmax(1)
        assert (hidden[:4].int().argmax(1) > ends).all(), "a prompt is masked"
        weights = torch.zeros(num_rows * n)
        weights[batch.rows] = batch.weights
        assert weights.view(num_rows, n)[4:].sum() == pytest.approx(1.5, rel=1e-5)


def test_no_held_out_problem_is_trained_on(scripts: dict[str, ModuleType]) -> None:
    problems = scripts["problems"]
    stream = problems.training_problems(0, 0, frozenset())
    seen = [next(stream)[0] for _ in range(20)]
    filtered = problems.training_problems(0, 0, frozenset(seen[3:5]))
    assert [next(filtered)[0] for _ in range(18)] == seen[:3] + seen[5:]
    excluded = pools(scripts, 1)._excluded
    assert {q for q, _ in problems.held_out(500) + problems.validation(128)} <= excluded
    for seed, pool in ((-1, 0), (2000, 0), (0, 10**6)):
        with pytest.raises(ValueError, match="seed must be"):
            next(problems.training_problems(seed, pool, frozenset()))


def test_wilson_interval(scripts: dict[str, ModuleType]) -> None:
    low, high = scripts["problems"].wilson_interval(90, 100)
    assert (low, high) == (pytest.approx(0.8256, abs=1e-4), pytest.approx(0.9448, abs=1e-4))


def test_batched_decoding_is_the_policy_none(
    tmp_path: Path, scripts: dict[str, ModuleType]
) -> None:
    """The evaluator that watches training and the engine give the same answers and forwards."""
    import elastic_cache

    folder = small_checkpoint(tmp_path)
    network = scripts["network"].load_network(folder, 256)
    engine = elastic_cache.load(str(folder), device="cpu", dtype="float32")
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(6, VOCAB, (n,), generator=generator).tolist() for n in (3, 40, 17)]
    for window, threshold in ((16, 0.9), (5, 0.3), (100, 0.02)):
        answers = scripts["decode"].decode(
            network, prompts, mask_id=MASK, eos_id=EOS, gen_length=24, window=window,
            threshold=threshold,
        )  # fmt: skip
        for prompt, answer in zip(prompts, answers, strict=True):
            out = engine.generate(
                prompt, gen_length=24, policy="none", window=window, threshold=threshold
            )
            produced = out.ids[len(prompt) :].tolist()
            assert answer.nfe == out.nfe
            assert answer.ids == produced[: len(answer.ids)]
            assert len(answer.ids) == out.num_tokens
