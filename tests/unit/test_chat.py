"""The chat: what is remembered, what commands do, and what a Ctrl-C leaves."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import elastic_cache
import pytest
from checkpoints import write_checkpoint, write_with_tokenizer
from elastic_cache.cli.chat import Chat
from elastic_cache.cli.conversation import Conversation, Turn, statistics_table
from elastic_cache.cli.options import read_assignments
from elastic_cache.engine import Engine, Request
from elastic_cache.types import Message, Step

QUESTION = "Ava has 5 apples. Then Ava buys 3 more apples. How many apples does Ava have now?"
SETTINGS: dict[str, Any] = {"policy": "elastic", "gen_length": 24, "tokens_per_step": 2}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A random model of at most 640 tokens."""
    return elastic_cache.load(str(write_with_tokenizer(tmp_path_factory.mktemp("m") / "random")))


@pytest.fixture
def chats(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[list[Message]]:
    """Every chat that the engine is given."""
    given: list[list[Message]] = []
    stream = engine.stream

    def record(prompt: Any, **settings: Any) -> Request:
        given.append(list(prompt))
        return stream(prompt, **settings)

    monkeypatch.setattr(engine, "stream", record)
    return given


def talk(engine: Engine, lines: Iterable[str], **settings: Any) -> int:
    """A chat in which these lines come through a pipe; its exit code."""
    left = iter(lines)

    def read() -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    return Chat(engine, {**SETTINGS, **settings}, read).run_through()


def interrupt_in_step(monkeypatch: pytest.MonkeyPatch, number: int, times: int = 1) -> None:
    """Ctrl-C is typed so many times while a step of the session runs; the first step is 0."""
    step, count = Request.step, iter(range(10**6))

    def interrupted(request: Request) -> Step | None:
        for _ in range(times if next(count) == number else 0):
            signal.raise_signal(signal.SIGINT)
        return step(request)

    monkeypatch.setattr(Request, "step", interrupted)


# the history


def test_turns_are_given_to_the_model(
    engine: Engine, chats: list[list[Message]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(engine, [QUESTION, "", "  And then? \n", "/clear", "Hello"]) == 0
    first = engine.generate([{"role": "user", "content": QUESTION}], **SETTINGS).text
    assert chats[1] == [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And then?"},
    ]
    second = engine.generate(chats[1], **SETTINGS).text
    assert chats[2] == [{"role": "user", "content": "Hello"}], "/clear forgets"
    third = engine.generate("Hello", **SETTINGS).text
    captured = capsys.readouterr()
    assert captured.out == f"{first}\n\n{second}\n\nthe history is empty\n{third}\n\n"
    assert captured.err == ""


def test_only_as_many_turns_are_forgotten_as_must_be(engine: Engine) -> None:
    tokenizer = engine.model.tokenizer
    assert tokenizer is not None
    conversation = Conversation(engine.model, [Turn(f"{i}?", "word " * 30) for i in range(6)])
    lengths = [
        len(tokenizer.encode(tokenizer.render_chat(conversation.messages("Now?", dropped))))
        for dropped in range(7)
    ]
    assert lengths == sorted(lengths, reverse=True) and lengths[-1] < lengths[0]
    for dropped, length in enumerate(lengths):
        assert conversation.fit("Now?", 640 - length) == dropped
        assert conversation.fit("Now?", 640 - length + 1) == min(dropped + 1, 6)
    assert len(conversation.turns) == 6, "looking forgets nothing"


def test_a_chat_outgrows_the_model(
    engine: Engine, chats: list[list[Message]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Old turns go with a notice; what is too long by itself is refused and costs no history."""
    long = "word " * 20
    assert talk(engine, [QUESTION, "word " * 900, long, long, "Hi"], gen_length=120) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("error: the prompt of ") and "at most 640" in said[0]
    assert len(chats[1]) == 1, "the sentence counts the question alone"
    assert len(chats[2]) == 3, "what was refused is not in the history"
    assert said[1].startswith("note: the oldest turn is forgotten") and "640 tokens" in said[1]
    assert 1 < len(chats[-1]) < 2 * 3 + 1


@pytest.mark.parametrize("num_steps", [0, 3])
def test_a_stopped_answer_is_remembered_up_to_its_first_gap(engine: Engine, num_steps: int) -> None:
    conversation = Conversation(engine.model)
    request = engine.stream(QUESTION, **{**SETTINGS, "tokens_per_step": 4})
    for _ in range(num_steps):
        request.step()
    answer = request.stop("cancelled")
    ids = answer.ids[request.prompt.text_start :].tolist()
    prefix = ids[: ids.index(engine.model.config.mask_id)]
    assert engine.model.tokenizer is not None
    text = engine.model.tokenizer.decode(prefix)
    assert conversation.add(QUESTION, answer) == bool(text.strip())
    assert conversation.turns == ([Turn(QUESTION, text)] if text.strip() else [])
    assert conversation.answers == [answer]


def test_the_gap_is_found() -> None:
    """A position left out in the middle: what stands behind it is not remembered."""
    engine = elastic_cache.load("tiny")
    request = engine.stream(QUESTION, gen_length=96, threshold=1.0, tokens_per_step=1)
    while request.step() is not None:
        ids = request.tokens()[request.prompt.text_start :].tolist()
        known = [i for i, token in enumerate(ids) if token != engine.model.config.mask_id]
        if known and known != list(range(len(known))) and known[0] == 0:
            break
    answer = request.stop("cancelled")
    conversation = Conversation(engine.model)
    assert conversation.add(QUESTION, answer)
    assert answer.text is not None
    kept = conversation.turns[0].answer
    assert kept and answer.text.startswith(kept) and len(kept) < len(answer.text)


# what goes wrong


def test_errors_keep_the_chat_alive(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["fill <|mdm_mask|> in", "caf\udce9", "/stat", "/fly", "/clear all", "/stats", "Hello"]
    assert talk(engine, lines) == 2
    captured = capsys.readouterr()
    errors = captured.err.splitlines()
    assert captured.out == f"{engine.generate('Hello', **SETTINGS).text}\n\n"
    assert len(errors) == 6 and all(line.startswith("error: ") for line in errors)
    assert "contains the mask token as text" in errors[0]
    assert "the line must be valid UTF-8" in errors[1]
    assert errors[2].endswith("no command '/stat': did you mean /stats?")
    assert errors[3].endswith("known are /help, /stats, /policy, /clear, /quit")
    assert "/clear stands alone on its line, got 'all'" in errors[4]
    assert "ask something first" in errors[5]


def test_a_model_without_tokenizer_cannot_chat(tmp_path: Path) -> None:
    engine = elastic_cache.load(str(write_checkpoint(tmp_path / "model")))
    with pytest.raises(ValueError, match="has no tokenizer.json: it cannot read a chat"):
        talk(engine, [])


# commands


def test_policy(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        "/policy dual block_length=8 tokens_per_step=none steps=2",
        "/policy elastic",
        "/policy elastic steps=none gama=0.5",
        "/policy elastic steps=none gamma=high",
        "/policy gamma",
        "/policy rolling num_rows=3 steps=none",
        "/policy",
        QUESTION,
        "/policy gen_length=8 steps=none",
    ]
    assert talk(engine, lines, gen_length=16) == 2
    captured = capsys.readouterr()
    errors = captured.err.splitlines()
    assert ["prefix or dual only" in errors[0], "did you mean gamma?" in errors[1]] == [True, True]
    assert "gamma must be a number, got 'high'" in errors[2]
    assert "policy must be one of" in errors[3] and "'gamma'" in errors[3]
    assert "num_rows must be at least the window of 16, got 3" in errors[4]
    changed = "policy=dual gen_length=16 block_length=8 steps=2"
    answer = engine.generate(QUESTION, policy="dual", gen_length=16, block_length=8, steps=2)
    assert answer.nfe == 2, "the setting is of use"
    assert captured.out.startswith(f"{changed}\n{changed}\n{answer.text}\n\n")
    assert captured.out.splitlines()[-1] == "policy=dual gen_length=8 block_length=8"


def test_quit_leaves_the_rest_unread(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    assert talk(engine, ["/quit", "Hello"]) == 0
    assert capsys.readouterr() == ("", "")


def test_help_names_every_command(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    assert talk(engine, ["/help"]) == 0
    out = capsys.readouterr().out
    for name in ("/help", "/stats", "/policy [NAME]", "/clear", "/quit", "Ctrl-C"):
        assert f"\n{name}" in f"\n{out}"


def test_stats(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    assert talk(engine, [QUESTION, "Hello", "/stats"]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = engine.generate(QUESTION, **SETTINGS)
    turn: list[Message] = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first.text or ""},
        {"role": "user", "content": "Hello"},
    ]
    last = engine.generate(turn, **SETTINGS)
    row = next(line.split() for line in lines if line.startswith("tokens  "))
    assert row == ["tokens", str(last.num_tokens), str(first.num_tokens + last.num_tokens)]
    assert lines[-1].startswith("history: 2 turns, ") and "640 tokens" in lines[-1]


def test_statistics_of_nothing_decoded(engine: Engine) -> None:
    table = statistics_table([engine.stream(QUESTION, **SETTINGS).stop("cancelled")])
    assert table.splitlines()[5].split() == ["tokens", "per", "forward", "-", "-"]
    assert table.splitlines()[-1].split() == ["ended", "by", "cancelled", "1", "cancelled"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["window=4", "gamma=inf"], {"window": 4, "gamma": float("inf")}),
        (["block_caching=False", "seed=none"], {"block_caching": False, "seed": None}),
    ],
)
def test_assignments(words: list[str], expected: dict[str, Any]) -> None:
    assert read_assignments(words) == expected


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("window", "a setting is written name=value, got 'window'"),
        ("windw=3", "there is no setting 'windw': did you mean window"),
        ("policy=none", "there is no setting 'policy': known are gen_length"),
        ("window=4.5", "window must be a whole number, got '4.5'"),
        ("window=none", "window must be a whole number, got 'none'"),
        ("block_caching=1", "block_caching must be true or false, got '1'"),
    ],
)
def test_wrong_assignments(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_assignments([word])


# Ctrl-C


def test_ctrl_c_in_a_pipe_prints_what_stands_and_ends(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    partial = engine.stream([{"role": "user", "content": QUESTION}], **SETTINGS)
    for _ in range(3):
        partial.step()
    interrupt_in_step(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        talk(engine, [QUESTION, "Hello"])
    assert capsys.readouterr().out == f"{partial.stop('cancelled').text}\n\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Tty:
    """A standard stream that says it is a terminal, of which nothing is asked but that."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_at_a_terminal_cancels_the_answer(
    engine: Engine,
    chats: list[list[Message]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    times: int,
) -> None:
    """The line after it is answered, with what was decoded before the gap in mind."""
    monkeypatch.setattr(sys, "stdin", Tty(sys.stdin))
    interrupt_in_step(monkeypatch, 2, times)
    lines = iter([QUESTION, "Hello", KeyboardInterrupt(), KeyboardInterrupt(), "/quit"])

    def read() -> str:
        line = next(lines)
        if isinstance(line, KeyboardInterrupt):
            raise line
        return line

    Chat(engine, dict(SETTINGS), read).converse()
    captured = capsys.readouterr()
    assert len(chats) == 2 and chats[1][-1] == {"role": "user", "content": "Hello"}
    cancelled = captured.err.splitlines()[0]
    is_kept = len(chats[1]) == 3
    assert cancelled.startswith("cancelled: what stands" if is_kept else "cancelled: nothing")
    assert captured.err.endswith("\nto leave, press Ctrl-D or type /quit\n")
    assert captured.err.count("to leave") == 1, "the first Ctrl-C says nothing"
    answer = engine.generate(chats[1], **SETTINGS)
    assert captured.out.endswith(f"{answer.text}\n\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
