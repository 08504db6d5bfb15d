"""The live view: what is dim, what is highlighted, which lines are kept, what is left behind."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from elastic_cache.display import (
    ASCII,
    UNICODE,
    View,
    answer_text,
    crop,
    layer_strip,
    printable,
    show,
    summary,
)
from elastic_cache.types import Generation, Step
from rich.console import Console
from rich.text import Text

MASK, EOS, DEPTH = 256, 257, 4


def decode(ids: Any) -> str:
    """A tokenizer whose tokens are the bytes of UTF-8 text."""
    return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


def styled(text: Text) -> list[tuple[str, str]]:
    return [(text.plain[span.start : span.end], str(span.style)) for span in text.spans]


def picture(ids: list[int], masked: list[bool], fresh: list[bool]) -> Text:
    return answer_text(ids, masked, fresh, decode, "░")


def test_masks_are_dim_and_new_tokens_highlighted() -> None:
    ids = [*b"abc", MASK, MASK, *b"d"]
    masked = [False] * 3 + [True] * 2 + [False]
    fresh = [False, True, True, False, False, False]
    text = picture(ids, masked, fresh)
    assert text.plain == "abc░░d"
    assert styled(text) == [("bc", "bold green"), ("░░", "dim")]


def test_characters_of_several_tokens_are_whole() -> None:
    """The second byte of é is committed later than the first: é is new then, and shown once."""
    ids = [*"né!".encode()]
    text = picture(ids, [False] * 4, [False, False, True, False])
    assert text.plain == "né!"
    assert styled(text) == [("é", "bold green")]


def test_committed_mask_token_is_text() -> None:
    """What is masked is a state of its own: a committed position is decoded whatever it holds."""
    assert picture([*b"a", MASK], [False, False], [False, False]).plain == "a"


def test_control_characters_are_not_obeyed() -> None:
    assert printable("a\x1b[31mb\x07\n\tc\x9b") == "a\ufffd[31mb\ufffd\n\tc\ufffd"


@pytest.mark.parametrize("height", [1, 2, 3, 7, 50])
def test_crop_keeps_the_decoding_place_in_view(height: int) -> None:
    text = Text("x" * 300)
    text.append("░" * 300, style="dim")
    lines = crop(text, width=20, height=height).plain.split("\n")
    assert len(lines) == min(height, 30)
    assert any("░" in line for line in lines)
    assert all(len(line) == 20 for line in lines)
    if height in (3, 7):
        assert "x" in lines[0], "some context before the first mask"


def test_crop_shows_the_end_of_a_finished_text() -> None:
    text = Text("\n".join(str(i) for i in range(10)))
    assert crop(text, width=20, height=3).plain == "7\n8\n9"


def test_crop_counts_wide_characters_as_two_cells() -> None:
    assert crop(Text("字字字"), width=4, height=9).plain == "字字\n字"


@pytest.mark.parametrize(
    ("first_full", "depth", "strip"),
    [
        (4, 4, ("····", 0)),
        (0, 4, ("████", 4)),
        (3, 4, ("···█", 1)),
        (31, 32, ("·" * 15 + "█", 1)),
        (30, 32, ("·" * 15 + "█", 2)),
        (16, 32, ("·" * 8 + "█" * 8, 16)),
        (1, 33, ("█" * 16, 32)),
    ],
)
def test_layer_strip(first_full: int, depth: int, strip: tuple[str, int]) -> None:
    assert layer_strip(first_full, depth, UNICODE) == strip


class FakeRequest:
    """Commits `answer`, one token a step, behind a prompt of two."""

    def __init__(self, answer: bytes, num_masked: int) -> None:
        ids = [*b"ab", *answer, EOS]
        self._ids = torch.tensor(ids + [MASK] * (2 + num_masked - len(ids)))
        masked = torch.tensor([False] * 2 + [True] * num_masked)
        self.prompt = SimpleNamespace(masked=masked, text_start=2)
        self._shown = torch.where(masked, MASK, self._ids)
        self._steps = self._run(len(answer) + 1)
        self.result = Generation(
            ids=self._ids,
            text=answer.decode(),
            num_tokens=len(answer),
            nfe=len(answer) + 1,
            update_frequency=0.25,
            seconds=1.0,
            finish_reason="eos",
            settings={},
        )

    def _run(self, count: int) -> Iterator[Step]:
        for index in range(count):
            position = 2 + index
            self._shown[position] = self._ids[position]
            first = -1 if index == 0 else DEPTH - index % 2
            yield Step(index, first, [position], [int(self._ids[position])], [1.0], [], [], 3, 0)

    def __next__(self) -> Step:
        return next(self._steps)

    def tokens(self) -> torch.Tensor:
        return self._shown.clone()

    def stop(self, reason: str) -> None:
        self.result = dataclasses.replace(self.result, finish_reason=reason)


def fake_model() -> Any:
    return SimpleNamespace(
        name="fake",
        tokenizer=SimpleNamespace(decode=decode),
        config=SimpleNamespace(num_layers=DEPTH, eos_id=EOS),
    )


def drawn(console: Console, view: View) -> str:
    with console.capture() as capture:
        console.print(view.frame(console.width, console.height))
    return capture.get()


def test_frames() -> None:
    request, console = FakeRequest(b"wxyz", 8), Console(width=70, height=10, no_color=True)
    view = View(cast(Any, request), fake_model(), UNICODE)
    view.add(next(request), 0.5)
    status = "step 1 · 1/8 tokens (+1) · 2 tokens/s · layers ████ 4/4"
    assert drawn(console, view).split("\n")[:3] == ["w" + "░" * 7, "", status]
    view.add(next(request), 1.0)
    view.add(next(request), 1.5)
    status = "step 3 · 3/8 tokens (+2) · 2 tokens/s · layers ···█ 1/4"
    assert drawn(console, view).split("\n")[:3] == ["wxy" + "░" * 5, "", status]
    for step in request._steps:
        view.add(step, 2.0)
    assert drawn(console, view).startswith("wxyz\n"), "nothing is shown from the EOS on"


@pytest.mark.parametrize("no_color", [False, True])
def test_show_leaves_answer_and_statistics(no_color: bool) -> None:
    stream = io.StringIO()
    console = Console(
        file=stream, force_terminal=True, width=90, height=12, no_color=no_color,
        color_system="standard", legacy_windows=False, _environ={"TERM": "xterm"},
    )  # fmt: skip
    result = show(cast(Any, FakeRequest(b"hi [b]there[/b]", 20)), fake_model(), console)
    assert result.finish_reason == "eos"
    written = stream.getvalue()
    assert ("\x1b[1;32m" in written) == (not no_color)
    assert "\x1b[32m" not in written
    tail = written[written.rindex("hi [b]there[/b]") :]
    assert "15 tokens in " in tail and "16 forwards (0.94 each)" in tail
    assert "25% refreshed" in tail and "gen_length reached" not in tail


class Shuffled(FakeRequest):
    """Commits every second position of the answer before the others."""

    def _run(self, count: int) -> Iterator[Step]:
        steps = list(super()._run(count))
        self._shown[2:] = MASK
        for step in steps[::2] + steps[1::2]:
            self._shown[step.committed[0]] = step.tokens[0]
            yield step


@pytest.mark.parametrize(("num_steps", "left"), [(0, ""), (3, "n░e░!"), (4, "noe░!")])
def test_a_cancelled_answer_stays_with_its_gaps(num_steps: int, left: str) -> None:
    stream = io.StringIO()
    console = Console(
        file=stream, force_terminal=True, width=90, height=12, color_system=None,
        legacy_windows=False, _environ={"TERM": "xterm"},
    )  # fmt: skip
    answers = iter([False] * num_steps)
    request = Shuffled(b"noel!", 9)
    result = show(cast(Any, request), fake_model(), console, lambda: next(answers, True))
    assert result.finish_reason == "cancelled"
    lines = stream.getvalue().splitlines()
    assert lines[-2].endswith(left) and "░░" not in lines[-2]
    assert lines[-1].endswith(" · 25% refreshed · cancelled")


def test_summary_says_when_the_answer_was_cut_off() -> None:
    result = dataclasses.replace(FakeRequest(b"ab", 4).result, finish_reason="length")
    line = "2 tokens in 0.50 s (4 tokens/s) | 3 forwards (0.67 each) | 25% refreshed"
    assert summary(result, 0.5, ASCII) == line + " | gen_length reached"


def test_ascii_terminals_get_ascii() -> None:
    request = FakeRequest(b"ab", 4)
    view = View(cast(Any, request), fake_model(), ASCII)
    view.add(next(request), 1.0)
    assert drawn(Console(width=80, height=9), view).isascii()


def test_dumb_terminals_get_the_answer_alone() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=90, _environ={"TERM": "dumb"})
    show(cast(Any, FakeRequest(b"hello", 9)), fake_model(), console)
    assert stream.getvalue().startswith("hello\n5 tokens in ")


def test_a_model_without_tokenizer_has_no_view() -> None:
    model = fake_model()
    model.tokenizer = None
    with pytest.raises(ValueError, match="'fake' has no tokenizer.json"):
        View(cast(Any, FakeRequest(b"a", 2)), model, UNICODE)
