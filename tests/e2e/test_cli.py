"""The command line: what each command prints, and one sentence for everything that is wrong."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import elastic_cache
import pytest
from checkpoints import ABSENT, write_with_tokenizer
from elastic_cache.cli import main
from elastic_cache.config import GenerationConfig
from safetensors.torch import load_file, save_file

PACKAGE = Path(elastic_cache.__file__).parent
TINY = PACKAGE / "data/tiny-llada"
QUESTION = "Ava has 5 apples. Then Ava buys 3 more apples. How many apples does Ava have now?"
Q1 = "model.transformer.blocks.1.q_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_with_tokenizer(tmp_path_factory.mktemp("models") / "random"))


def generate(model: object, *options: str, prompt: str = QUESTION) -> list[str]:
    given = ["--model", str(model), "--gen-length", "24", "--prompt", prompt]
    return ["generate", *given, *options]


def shell(*arguments: str, **options: Any) -> subprocess.CompletedProcess[Any]:
    command = [sys.executable, "-m", "elastic_cache", *arguments]
    return subprocess.run(command, capture_output=True, timeout=60, **options)


def refuses(capsys: pytest.CaptureFixture[str], argv: list[str], *words: str) -> None:
    """The command ends with code 2 and one sentence on stderr that has all the words in it."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    for word in words:
        assert word in captured.err


# generate


def test_json_is_one_object(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(generate(model, "--json", "--gamma", "0.99", "--tokens-per-step", "3")) == 0
    out = json.loads(capsys.readouterr().out)
    assert list(out) == [
        "text", "ids", "num_tokens", "nfe", "tokens_per_forward", "update_frequency", "seconds",
        "finish_reason", "settings",
    ]  # fmt: skip
    expected = elastic_cache.load(model).generate(
        QUESTION, gen_length=24, gamma=0.99, tokens_per_step=3
    )
    assert out["ids"] == expected.ids.tolist()
    assert out["text"] == expected.text
    assert out["nfe"] == expected.nfe
    assert out["tokens_per_forward"] == expected.num_tokens / expected.nfe
    assert out["settings"] == expected.settings


def test_every_setting_has_an_option(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = dict(
        gen_length=16, policy="dual", window=5, gamma=0.5, threshold=0.7, track_num=2,
        block_length=8, num_rows=40, steps=4, temperature=0.5, seed=7,
    )  # fmt: skip
    options = [x for k, v in given.items() for x in ("--" + k.replace("_", "-"), str(v))]
    assert main([*generate(model), *options, "--no-block-caching", "--json"]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    unset = dict(block_caching=False, tokens_per_step=None, factor=None)
    assert settings == {**given, **unset}
    assert main([*generate(model, "--factor", "1.5", "--json")]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["factor"] == 1.5


def test_defaults_are_those_of_the_api(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", model, "--prompt", QUESTION, "--json"]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert GenerationConfig(**settings) == GenerationConfig()


def test_json_has_no_infinity(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(generate(model, "--json", "--gamma", "inf")) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["gamma"] == "inf"


@pytest.mark.parametrize("options", [[], ["--quiet"]], ids=["pipe", "quiet"])
def test_plain_output_is_the_answer_alone(
    model: str, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert main(generate(model, *options)) == 0
    captured = capsys.readouterr()
    text = elastic_cache.load(model).generate(QUESTION, gen_length=24).text
    assert (captured.out, captured.err) == (f"{text}\n", "")


def test_prompt_from_standard_input(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line break at the end, as `echo` makes it, is no part of the prompt."""
    stdin = SimpleNamespace(buffer=io.BytesIO(QUESTION.encode() + b"\n"))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(generate(model, "--json", prompt="-")) == 0
    piped = json.loads(capsys.readouterr().out)
    assert main(generate(model, "--json")) == 0
    assert json.loads(capsys.readouterr().out)["ids"] == piped["ids"]


# what goes wrong


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gen-length", "0"], ["gen_length must be at least 1, got 0"]),
        (["--gen-length", "-3"], ["gen_length must be at least", "-3"]),
        (["--gen-length", "5000"], ["gen_length 5000", "at most 640"]),
        (["--window", "0"], ["window must be at least 1, got 0"]),
        (["--track-num", "0"], ["track_num must be at least 1"]),
        (["--block-length", "0"], ["block_length must be at least 1"]),
        (["--gamma", "nan"], ["gamma must be a number, got nan"]),
        (["--threshold", "nan"], ["threshold must be a number, got nan"]),
        (["--threshold", "1.5"], ["threshold must be between 0 and 1, got 1.5"]),
        (["--temperature", "-1"], ["temperature must be at least 0"]),
        (
            ["--policy", "fast"],
            ["policy must be one of none, prefix, dual, elastic, rolling", "'fast'"],
        ),
        (["--steps", "4"], ["steps", "prefix or dual"]),
        (["--steps", "5", "--policy", "dual", "--block-length", "8"], ["steps must be", "got 5"]),
        (["--factor", "1", "--tokens-per-step", "2"], ["tokens_per_step and factor"]),
        (["--dtype", "float8"], ["dtype must be one of float32, bfloat16, got 'float8'"]),
        (["--device", "tpu"], ["device must be cpu", "'tpu'"]),
        (["--window", "wide"], ["--window", "'wide'", "generate --help"]),
        (["--speed", "9"], ["unrecognized arguments: --speed 9"]),
        (["--json", "--quiet"], ["--quiet", "not allowed with"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_wrong_options(
    model: str, capsys: pytest.CaptureFixture[str], options: list[str], words: list[str]
) -> None:
    refuses(capsys, generate(model, *options), *words)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", ["the prompt is empty"]),
        (" \n", ["the prompt is empty"]),
        ("fill <|mdm_mask|> in", ["the prompt contains the mask token as text"]),
        ("a word " * 400, ["the prompt of", "at most 640"]),
        (os.fsdecode(b"caf\xe9"), ["--prompt must be valid UTF-8", "0xe9 at offset 3"]),
    ],
    ids=["empty", "blank", "mask", "long", "latin-1"],
)
def test_wrong_prompts(
    model: str, capsys: pytest.CaptureFixture[str], prompt: str, words: list[str]
) -> None:
    refuses(capsys, generate(model, prompt=prompt), *words)


def test_standard_input_must_be_utf8(model: str) -> None:
    done = shell(*generate(model, prompt="-"), input=b"caf\xe9 au lait")
    assert (done.returncode, done.stdout) == (2, b"")
    expected = "error: the prompt from standard input must be valid UTF-8, got byte 0xe9 at offset"
    assert done.stderr.decode() == f"{expected} 3\n"


def truncate(folder: Path) -> None:
    shard = next(folder.glob("model-00002*"))
    shard.write_bytes(shard.read_bytes()[:-100])


def edit_tensor(change: Callable[[Any], Any], name: str = Q1) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        for file in folder.glob("*.safetensors"):
            tensors = load_file(file)
            if name in tensors:
                save_file({**tensors, name: change(tensors[name])}, file)

    return edit


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: next(f.glob("model-00002*")).unlink(), ["model-00002-of", "does not exist"]),
        (truncate, ["model-00002-of", "truncated"]),
        (edit_tensor(lambda t: t[:, 1:].clone()), [Q1, "must be [32, 32]", "[32, 31]"]),
        (edit_tensor(lambda t: t.int()), [Q1, "dtypes", "I32"]),
        (
            edit_tensor(lambda t: t * float("nan"), "model.transformer.ln_f.weight"),
            ["logits that are not finite numbers at step 0"],
        ),
        (lambda f: (f / "config.json").unlink(), ["config.json does not exist"]),
        (lambda f: (f / "tokenizer.json").unlink(), ["has no tokenizer.json"]),
        (lambda f: (f / "tokenizer.json").write_text("{"), ["tokenizer.json is no readable"]),
    ],
    ids=["missing", "truncated", "shape", "dtype", "nan", "no-config", "no-tokenizer", "tokenizer"],
)
def test_damaged_checkpoints(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], object],
    words: list[str],
) -> None:
    folder = write_with_tokenizer(tmp_path / "model", shards=3)
    damage(folder)
    refuses(capsys, generate(folder), *words)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (dict(mask_token_id=ABSENT), ["config.json lacks mask_token_id"]),
        (dict(model_type="mamba"), ["model_type 'mamba'", "not supported"]),
        (dict(n_heads=5), ["d_model must be a multiple of n_heads"]),
    ],
    ids=["mask", "architecture", "heads"],
)
@pytest.mark.parametrize("command", ["generate", "info"])
def test_wrong_configs(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    overrides: dict[str, Any],
    words: list[str],
) -> None:
    folder = write_with_tokenizer(tmp_path / "model", **overrides)
    refuses(capsys, generate(folder) if command == "generate" else ["info", str(folder)], *words)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["required: COMMAND"]),
        (["fly"], ["invalid choice: 'fly'"]),
        (["generate"], ["required: --prompt", "elastic-cache generate --help"]),
        (["info"], ["required: MODEL"]),
        (["info", "no such model"], ["'no such model' is no existing folder"]),
        (["bench", "--policies", "none,fast"], ["policy must be one of", "'fast'"]),
        (["bench", "--policies", "none,none"], ["policies must name each cell once"]),
        (["bench", "--problems", "0"], ["problems must be at least 1"]),
        (["bench", "--repeat", "0"], ["repeat must be at least 1"]),
        (["bench", "--json", "/no/such/folder/x"], ["json must name a file in an existing folder"]),
        (["bench", "--shard", "3/2"], ["shard must be I/N with 1 <= I <= N, got '3/2'"]),
        (["bench", "--shard", "1/2"], ["shard needs --out"]),
        (["bench", "--report", "--out", "/no/such"], ["report needs --out", "'/no/such'"]),
        (["bench", "--inflate", "gpt"], ["inflate must be llada-8b, got 'gpt'"]),
        (["bench", "--policies", "fast-dllm"], ["need --fast-dllm FOLDER"]),
        (
            ["bench", "--policies", "fast-dllm", "--fast-dllm", "/no/such"],
            ["must be a folder", "git clone"],
        ),
        (["bench", "--overhead", "--device", "cuda"], ["overhead", "device cpu only"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_wrong_commands(
    capsys: pytest.CaptureFixture[str], argv: list[str], words: list[str]
) -> None:
    refuses(capsys, argv, *words)


# info


def test_info_of_the_embedded_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "tiny", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    count = sum(t.numel() for t in load_file(TINY / "model.safetensors").values())
    config = json.loads((TINY / "config.json").read_text())
    assert facts["num_parameters"] == count
    assert facts["bytes"] == {"float32": 4 * count, "bfloat16": 2 * count}
    assert facts["context_length"] == config["max_sequence_length"]
    assert facts["special_ids"]["mask"] == {"id": 2, "token": "<|mdm_mask|>"}
    assert facts["chat_template"] == "llada"
    row, depth = 4 * config["d_model"], config["n_layers"]
    caches = facts["cache_bytes_per_token"].items()
    assert {policy: sizes["float32"] for policy, sizes in caches} == {
        "none": 3 * row,  # one layer of q, k, v that every layer writes anew
        "prefix": (2 * depth + 1) * row,
        "dual": (2 * depth + 1) * row,
        "elastic": 4 * depth * row,
    }


def test_info_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_with_tokenizer(tmp_path / "model", num_kv_heads=2, tied=True)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert main(["info", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "2 layers, width 32, 4 heads (2 KV) of 8" in out and "(tied)" in out
    assert "640 tokens" in out and "the checkpoint's own" in out
    (folder / "tokenizer.json").unlink()
    assert main(["info", str(folder)]) == 0
    assert "prompts are token ids" in capsys.readouterr().out


# doctor


def test_doctor_finds_nothing_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in report["checks"]}
    assert report["ok"] and "CPU" in checks["op window_attention"]["value"].split()
    assert "Meta" in checks["op commit"]["value"].split()
    assert checks["embedded model"]["value"].startswith("answers: ")


@pytest.fixture
def unbuilt(tmp_path: Path) -> dict[str, str]:
    """An environment in which the package has no native library."""
    (tmp_path / "elastic_cache").mkdir()
    for path in PACKAGE.iterdir():
        if path.suffix != ".so" and path.name != "__pycache__":
            (tmp_path / "elastic_cache" / path.name).symlink_to(path)
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def test_doctor_without_the_native_library(unbuilt: dict[str, str]) -> None:
    done = shell("doctor", env=unbuilt, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    problems = [line for line in done.stdout.splitlines() if line.startswith("problem: ")]
    assert [line.split(": ")[1] for line in problems] == ["operators", "embedded model"]
    assert "not built" in problems[0] and "pip install --no-build-isolation -e ." in problems[0]
    assert done.stdout.splitlines()[-1] == "something required is broken"


def test_generate_without_the_native_library(unbuilt: dict[str, str]) -> None:
    done = shell("generate", "--prompt", "Hi", env=unbuilt, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "pip install --no-build-isolation -e ." in done.stderr


def test_doctor_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from elastic_cache.cli import main; "
    command = [sys.executable, "-c", code + "sys.exit(main(['doctor', '--json']))"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["torch"]["problem"] and "pip install torch" in checks["torch"]["fix"]
    assert checks["compiler"]["value"]


# the program as people run it


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from elastic_cache.cli import main\n"
    code += "try: main(['generate', '--help'])\n"
    code += "finally: assert not {'torch', 'rich'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("--prompt", "--gen-length", "--tokens-per-step", "--no-block-caching"):
        assert name in done.stdout


def test_closed_pipe_is_no_traceback(model: str) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "elastic_cache", *generate(model)]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (2, b"")


def on_terminal(arguments: list[str], interrupt_at: bytes | None = None) -> tuple[int, str]:
    """Runs the command on a terminal of 80 x 24; types Ctrl-C when `interrupt_at` is shown."""
    ours, theirs = pty.openpty()
    # A session of its own, with the terminal as its controlling one, so that Ctrl-C arrives.
    attach = "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    attach += "from elastic_cache.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", attach, *arguments],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24", "LANG": "C.UTF-8"},
    )  # fmt: skip
    os.close(theirs)
    stop = threading.Timer(60, process.kill)
    stop.start()
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
            if interrupt_at and interrupt_at in shown:
                os.write(ours, b"\x03")
                interrupt_at = None
    except OSError:  # how a terminal says that its last user has gone
        pass
    finally:
        stop.cancel()
        os.close(ours)
    return process.wait(), shown.decode("utf-8", "replace")


def test_live_view_on_a_terminal() -> None:
    code, shown = on_terminal(["generate", "--gen-length", "96", "--prompt", QUESTION])
    assert code == 0
    assert "░░░░" in shown and "step 1 · " in shown and "layers ████" in shown
    answer = elastic_cache.load("tiny").generate(QUESTION, gen_length=96).text or ""
    assert answer.replace("\n", "\r\n") in shown
    assert shown.rstrip().splitlines()[-1].count(" · ") == 2, "one line of statistics at the end"
    assert "\x1b[?25h" in shown, "the cursor is visible again"


def test_ctrl_c_ends_quietly() -> None:
    # About 70 steps of 100 ms: the interrupt arrives long before the answer ends.
    arguments = ["generate", "--policy", "none", "--gen-length", "500", "--tokens-per-step", "1"]
    code, shown = on_terminal([*arguments, "--prompt", QUESTION], interrupt_at=b"step 1 ")
    assert code == 130
    assert "Traceback" not in shown and "error" not in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("step 1 "), "the cursor is visible again"
