"""`elastic-cache chat` as people run it: through a pipe, and on a terminal with Ctrl-C."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import elastic_cache
import pytest
from checkpoints import write_checkpoint

QUESTION = "Ava has 5 apples. Then Ava buys 3 more apples. How many apples does Ava have now?"
SECONDS = 120.0
"""How long anything may take that is waited for, on a slow and busy machine."""


def through_pipe(lines: bytes, *options: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "elastic_cache", "chat", *options]
    return subprocess.run(command, input=lines, capture_output=True, timeout=SECONDS)


def test_a_pipe_gets_plain_answers() -> None:
    lines = f"{QUESTION}\n/clear\n\n{QUESTION}\r\n/stats".encode()
    done = through_pipe(lines, "--gen-length", "96")
    answer = elastic_cache.load("tiny").generate(QUESTION, gen_length=96).text
    assert answer is not None and answer.endswith("#### 8")
    assert (done.returncode, done.stderr) == (0, b"")
    out = done.stdout.decode()
    assert out.startswith(f"{answer}\n\nthe history is empty\n{answer}\n\n")
    assert re.search(r"\nended by +eos +2 eos\nhistory: 1 turn, \d+ of the model's 4096 ", out)


def test_a_pipe_goes_on_after_errors() -> None:
    done = through_pipe(f"caf\xe9\n/quti\n{QUESTION}\n".encode("latin-1"), "--gen-length", "96")
    assert done.returncode == 2
    assert done.stdout.decode().endswith("#### 8\n\n")
    errors = done.stderr.decode().splitlines()
    assert "error: the line must be valid UTF-8" in errors[0]
    assert errors[1:] == ["error: there is no command '/quti': did you mean /quit?"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--policy", "fast"], "policy must be one of"),
        (["--gen-length", "-1"], "gen_length must be at least"),
        (["--model", "no such model"], "'no such model' is no existing folder"),
    ],
)
def test_wrong_options(options: list[str], words: str) -> None:
    done = through_pipe(b"", *options)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode().startswith("error: ") and words in done.stderr.decode()


def test_without_tokenizer(tmp_path: Path) -> None:
    done = through_pipe(b"", "--model", str(write_checkpoint(tmp_path / "model")))
    assert done.returncode == 2 and b"it cannot read a chat" in done.stderr


class Terminal:
    """The command on a terminal of 80 x 24, typed at and read from."""

    def __init__(self, *options: str) -> None:
        self._ours, theirs = pty.openpty()
        # A session of its own, with the terminal as its controlling one, so that Ctrl-C arrives;
        # and with Ctrl-C as it is by default, as a test run in the background ignores it.
        attach = "import fcntl, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        attach += "signal.signal(signal.SIGINT, signal.default_int_handler); "
        attach += "from elastic_cache.cli import main; sys.exit(main(sys.argv[1:]))"
        size = {"TERM": "xterm", "COLUMNS": "80", "LINES": "24", "LANG": "C.UTF-8"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", attach, "chat", *options],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env={**os.environ, **size},
        )  # fmt: skip
        os.close(theirs)
        self._unread = ""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def expect(self, text: str) -> str:
        """Waits until `text` is shown; returns what was shown since the last time, up to it."""
        assert self._is_shown(text, SECONDS), f"{text!r} was not shown, but {self._unread!r}"
        before, _, self._unread = self._unread.partition(text)
        return before + text

    def interrupt(self, text: str) -> str:
        """Types Ctrl-C at the prompt, as often as it takes, and expects `text`.

        Python looks at signals before it waits for a key: of one that comes just between the two
        it learns at the next.
        """
        for _ in range(int(SECONDS / 5)):
            self.type("\x03")
            if self._is_shown(text, 5):
                break
        return self.expect(text)

    def _is_shown(self, text: str, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while text not in self._unread:
            ready, _, _ = select.select([self._ours], [], [], max(end - time.monotonic(), 0))
            if not ready:
                return False
            try:
                chunk = os.read(self._ours, 4096)
            except OSError:  # how a terminal says that its last user has gone
                chunk = b""
            assert chunk, f"the program has ended without {text!r}: {self._unread!r}"
            self._unread += chunk.decode("utf-8", "replace")
        return True

    def close(self) -> None:
        os.close(self._ours)
        self.process.kill()
        self.process.wait()


@pytest.fixture
def slow() -> Iterator[Terminal]:
    """A chat whose answers take 80 steps of 1,000 rows, decoded from left to right: 40 s."""
    terminal = Terminal("--policy", "none", "--gen-length", "1000", "--window", "1")
    yield terminal
    terminal.close()


def test_ctrl_c_cancels_the_answer_and_not_the_program(slow: Terminal) -> None:
    assert "answers arithmetic word problems" in slow.expect("> ")
    slow.type(QUESTION + "\n")
    slow.expect("step 2 ")  # it runs, and has dozens of steps before it
    slow.type("\x03")
    shown = slow.expect("cancelled: what stands before the first gap is remembered")
    assert " · cancelled" in shown and "Traceback" not in shown
    assert "\x1b[?25h" in shown, "the cursor is visible again"
    slow.expect("> ")
    slow.type("/stats\n")
    assert "1 cancelled" in slow.expect("history: 1 turn, ")
    slow.expect("> ")
    slow.type("/clear\n/policy elastic window=16 gen_length=96\n")
    slow.expect("policy=elastic gen_length=96")
    slow.expect("> ")
    slow.type(QUESTION + "\n")
    assert "step 1 " in slow.expect("#### 8")
    assert " refreshed" in slow.expect("> ")
    slow.type("/quit\n")
    assert slow.process.wait(SECONDS) == 0


def test_ctrl_c_and_ctrl_d_at_the_prompt() -> None:
    terminal = Terminal("--gen-length", "96")
    try:
        terminal.expect("> ")
        terminal.type("half a ques")
        terminal.expect("ques")
        assert "to leave" not in terminal.interrupt("> ")
        terminal.interrupt("to leave, press Ctrl-D or type /quit")
        terminal.expect("> ")
        terminal.type("/hlep\n")
        terminal.expect("error: there is no command '/hlep': did you mean /help?")
        terminal.expect("> ")
        terminal.type("\x04")
        assert terminal.process.wait(SECONDS) == 0
    finally:
        terminal.close()


def test_input_history_on_the_up_key() -> None:
    pytest.importorskip("readline")
    terminal = Terminal()
    try:
        terminal.expect("> ")
        terminal.type("/policy window=7\n")
        terminal.expect("window=7 gamma")
        terminal.expect("> ")
        terminal.type("\x1b[A\x7f9\n")  # the line before, its last character replaced
        terminal.expect("window=9 gamma")
        terminal.expect("> ")
        terminal.type("/quit\n")
        assert terminal.process.wait(SECONDS) == 0
    finally:
        terminal.close()
