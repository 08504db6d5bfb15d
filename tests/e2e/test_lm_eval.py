"""The lm-evaluation-harness with the embedded model: its scores are those of the engine itself."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from elastic_cache.problems import HELD_OUT_SEED, final_number, problems
from elastic_cache.prompt import encode_prompt
from elastic_cache.types import Generation

pytest.importorskip("lm_eval")  # machines without a network have no harness

import lm_eval  # noqa: E402
from elastic_cache import lm_eval as adapter  # noqa: E402
from elastic_cache.lm_eval import ElasticCacheLM, text_until  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

PROBLEMS = problems(HELD_OUT_SEED, 3)
QUESTION = PROBLEMS[0][0]


@pytest.fixture(scope="module")
def model() -> ElasticCacheLM:
    return ElasticCacheLM(model="tiny", device="cpu", gen_length=24, window=8)


@pytest.fixture
def requested(
    model: ElasticCacheLM, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[dict[str, Any]]]:
    """What the engine is asked for, in place of an answer: prompt ids and settings."""
    seen: list[dict[str, Any]] = []

    def generate(ids: list[int], **settings: Any) -> Generation:
        seen.append({"ids": ids, **settings})
        return Generation(torch.tensor(ids), "", 0, 1, 1.0, 1.0, "eos", settings)

    monkeypatch.setattr(model.engine, "generate", generate)
    yield seen


def request(text: str, **generation_kwargs: Any) -> Instance:
    return Instance("generate_until", {}, (text, generation_kwargs), 0)


def write_task(folder: Path) -> None:
    """Task "problems", made like GSM8K: the number after "####" decides."""
    rows = [json.dumps({"question": q, "answer": a}) for q, a in PROBLEMS]
    (folder / "problems.jsonl").write_text("\n".join(rows))
    (folder / "problems.yaml").write_text(
        f"""
task: problems
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/problems.jsonl}}
  cache_dir: {folder}/cache
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer.split('####')[-1].strip()}}}}"
generation_kwargs: {{until: ["Question:", "<|eot_id|>"], do_sample: false}}
filter_list:
  - name: number
    filter:
      - {{function: regex, regex_pattern: '#### (-?\\d+)'}}
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
    )


@pytest.mark.parametrize(
    ("name", "model_args", "settings"),
    [
        (
            "elastic_cache",
            "model=tiny,device=cpu,gen_length=160,policy=elastic,window=16,gamma=0.9",
            dict(policy="elastic", window=16, gamma=0.9),
        ),
        (
            "llada_dist",
            "model_path=tiny,gen_length=160,steps=5,block_length=32,threshold=0.9,use_cache=True,"
            "dual_cache=True,show_speed=True",
            dict(policy="dual", block_length=32, threshold=0.9),
        ),
    ],
    ids=["own names", "names of llada_dist"],
)
def test_score_is_that_of_the_engine(
    tmp_path: Path, model: ElasticCacheLM, name: str, model_args: str, settings: dict[str, Any]
) -> None:
    write_task(tmp_path)
    out = lm_eval.simple_evaluate(
        model=name,
        model_args=model_args,
        tasks=["problems"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
        device="cpu",
    )
    assert out is not None
    texts = [sample["resps"][0][0] for sample in out["samples"]["problems"]]
    expected = [model.engine.generate(q, gen_length=160, **settings).text for q, _ in PROBLEMS]
    assert texts == expected
    right = [
        final_number(text) == final_number(answer)
        for text, (_, answer) in zip(texts, PROBLEMS, strict=True)
    ]
    assert any(right)
    assert out["results"]["problems"]["exact_match,number"] == pytest.approx(sum(right) / 3)


def test_the_command_runs_the_harness(tmp_path: Path) -> None:
    write_task(tmp_path)
    options = "--model elastic_cache --model_args model=tiny,gen_length=8,show_speed=True --limit 1"
    command = [sys.executable, "-m", "elastic_cache.lm_eval", *options.split()]
    command += ["--tasks", "problems", "--include_path", str(tmp_path), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "1 answers" in done.stdout and "|problems|" in done.stdout


HIDE_HARNESS = """
import runpy, sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "lm_eval":
            raise ModuleNotFoundError("hidden", name=name)
sys.meta_path.insert(0, Hide())
"""


@pytest.mark.parametrize(
    ("call", "is_alone"),
    [
        ("runpy.run_module('elastic_cache.lm_eval', run_name='__main__')", True),
        ("import elastic_cache.lm_eval", False),
    ],
    ids=["command", "import"],
)
def test_without_the_harness_one_sentence(call: str, is_alone: bool) -> None:
    command = [sys.executable, "-c", HIDE_HARNESS + call]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == ""
    *before, last = done.stderr.splitlines()
    assert "needs the lm-evaluation-harness" in last and "pip install lm_eval" in last
    assert (not before) == is_alone and "hidden" not in done.stderr


def test_text_ends_at_the_first_stop_string(model: ElasticCacheLM) -> None:
    asked = dict(max_gen_toks=24)
    prompt = model.apply_chat_template([{"role": "user", "content": QUESTION}])
    full, cut = model.generate_until(
        [request(prompt, **asked), request(prompt, until=[" has ", "absent", " "], **asked)],
        disable_tqdm=True,
    )
    assert " " in full and cut == full.split(" ")[0]


def test_stop_string_that_is_a_special_token(model: ElasticCacheLM) -> None:
    tokenizer = model.engine.model.tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode("one two<|eot_id|>three")
    assert text_until(tokenizer, ids, []) == "one twothree"
    assert text_until(tokenizer, ids, ["<|eot_id|>"]) == "one two"
    assert text_until(tokenizer, ids, ["<|eot_id|>", " two"]) == "one"


def test_text_is_tokenised_as_it_is(model: ElasticCacheLM, requested: list[dict[str, Any]]) -> None:
    tokenizer = model.engine.model.tokenizer
    assert tokenizer is not None
    assert model.generate_until([request("Q: 1+1?\nA:", max_gen_toks=99)]) == [""]
    assert requested[0]["ids"] == tokenizer.encode("Q: 1+1?\nA:")
    assert (requested[0]["gen_length"], requested[0]["window"]) == (24, 8)


def test_chat_template_is_the_engines(model: ElasticCacheLM) -> None:
    tokenizer = model.engine.model.tokenizer
    assert tokenizer is not None
    rendered = model.apply_chat_template([{"role": "user", "content": QUESTION}])
    expected = encode_prompt(model.engine.model, QUESTION, 1).ids[:-1]
    assert tokenizer.encode(rendered) == expected.tolist()
    begun = model.apply_chat_template(
        [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "It is"}],
        add_generation_prompt=False,
    )
    assert begun == rendered + "It is"
    assert model.chat_template(True) == rendered.replace(QUESTION, "{content}")
    assert model.chat_template(False) == ""
    with pytest.raises(ValueError, match="takes no name here, got 'zephyr'"):
        model.chat_template("zephyr")
    assert model.tokenizer_name == "tiny"


def test_long_prompt_keeps_its_end(
    requested: list[dict[str, Any]], model: ElasticCacheLM, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = model.engine.model.tokenizer
    assert tokenizer is not None
    text = "Ava has 12 apples. " * 1000
    room = model.engine.model.config.max_length - 24
    with caplog.at_level(logging.WARNING):
        model.generate_until([request(text)])
    assert requested[0]["ids"] == tokenizer.encode(text)[-room:]
    assert f"its last {room}" in caplog.text


def test_mask_token_in_a_text_is_refused(model: ElasticCacheLM) -> None:
    tokenizer = model.engine.model.tokenizer
    assert tokenizer is not None
    mask = tokenizer.token(model.engine.model.config.mask_id)
    with pytest.raises(ValueError, match="mask token"):
        model.generate_until([request(f"fill in {mask}")])


def test_repeated_request_has_its_own_seed(
    model: ElasticCacheLM, requested: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(model.arguments.settings, "seed", 5)
    model.generate_until([request("a"), request("b"), request("a")])
    assert [asked["seed"] for asked in requested] == [5, 5, 6]


def test_answers_go_to_the_cache_of_the_harness(
    model: ElasticCacheLM, requested: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    added: list[tuple[Any, ...]] = []
    hook = type("Hook", (), {"add_partial": lambda self, *given: added.append(given)})()
    monkeypatch.setattr(model, "cache_hook", hook)
    model.generate_until([request("a", until=["b"])])
    assert added == [("generate_until", ("a", {"until": ["b"]}), "")]


def test_speed_counts_to_the_first_eos(capsys: pytest.CaptureFixture[str]) -> None:
    model = ElasticCacheLM(model="tiny", device="cpu", gen_length=160, show_speed=True)
    prompt = model.apply_chat_template([{"role": "user", "content": QUESTION}])
    model.generate_until([request(prompt), request(prompt)], disable_tqdm=True)
    said = capsys.readouterr().out
    answer = model.engine.generate(QUESTION, gen_length=160)
    assert answer.finish_reason == "eos"
    assert f"2 answers, {2 * answer.num_tokens} tokens up to the first EOS" in said
    assert f"{answer.num_tokens / answer.nfe:.2f} tokens per forward" in said
    assert f"{2 * answer.nfe} forwards (NFE)" in said and "batch size 1, cpu" in said
    rate = re.search(r"in ([\d.]+) s: ([\d.]+) tokens/s", said)
    assert rate and float(rate[1]) * float(rate[2]) == pytest.approx(2 * answer.num_tokens, rel=0.1)


def test_likelihoods_are_refused(model: ElasticCacheLM) -> None:
    with pytest.raises(NotImplementedError, match="no exact likelihood"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="generation tasks"):
        model.loglikelihood_rolling([])


def test_model_args_come_before_the_harness_options() -> None:
    options = {"device": "cuda:7", "batch_size": 1, "max_batch_size": None}
    model = ElasticCacheLM.create_from_arg_string("model=tiny,device=cpu,batch_size=auto", options)
    assert model.device.type == "cpu" and model.engine.model.dtype == torch.float32


def test_default_device_of_the_harness_means_any(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_gpu(name: str) -> torch.device:
        raise ValueError(f"device is {name}, but there is none")

    monkeypatch.setattr(adapter, "find_device", no_gpu)
    model = ElasticCacheLM.create_from_arg_obj({"model": "tiny"}, {"device": "cuda:0"})
    assert model.device.type == "cpu" and "there is none" in caplog.text
    with pytest.raises(ValueError, match="device is cuda:1"):
        ElasticCacheLM.create_from_arg_obj({"model": "tiny"}, {"device": "cuda:1"})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(mask_id=126336), "mask_id is 126336, but 'tiny' was trained with 2"),
        (dict(max_length=5000), "between 1 and the model's 4096, got 5000"),
        (dict(max_length="long"), "between 1 and the model's 4096, got 'long'"),
        (dict(dtype="int8"), "dtype must be one of"),
    ],
)
def test_arguments_that_do_not_fit_the_model(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        ElasticCacheLM(model="tiny", device="cpu", **given)


def test_prompt_needs_room() -> None:
    model = ElasticCacheLM(model="tiny", device="cpu", gen_length=32, max_length=32)
    with pytest.raises(ValueError, match="gen_length 32 leaves no room"):
        model.generate_until([request("a")])


def test_checkpoint_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer.json"):
        ElasticCacheLM(model=str(write_checkpoint(tmp_path)), device="cpu")
