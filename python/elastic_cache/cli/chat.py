"""`elastic-cache chat`: question after question, answered live on a terminal, plainly in a pipe.

What the user says to the program and not to the model begins with a slash. Ctrl-C ends what runs:
an answer stays on the screen as it stands, and so far as it has no gap it is remembered; a line
being typed is thrown away. The subtle thing: during an answer the first Ctrl-C is only noted and
looked at between steps, so that no step is torn; a second one does not wait for the step.

In a pipe every line is a question or a command. There is nobody who could go on after a Ctrl-C, so
it ends the program as well as the answer; and what was refused makes the exit code 2 at the end.
"""

from __future__ import annotations

import argparse
import io
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from elastic_cache.cli import EXIT_ERROR, USER_ERRORS, sentence
from elastic_cache.cli import options as shared
from elastic_cache.cli.table import format_fields
from elastic_cache.config import GenerationConfig, hint

if TYPE_CHECKING:
    from types import FrameType

    from elastic_cache.engine import Engine
    from elastic_cache.request import Request
    from elastic_cache.types import Generation

_PROMPT = "> "


def add_command(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "chat",
        help="ask question after question",
        description="Asks for questions and answers them, each with those before it in mind. "
        "/help lists what can be done there.",
    )
    shared.add_model(parser)
    shared.add_policy(parser)
    shared.add_settings(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    settings = shared.read_request(options)
    if sys.stdin is None:
        raise ValueError("chat reads questions from standard input, which is closed")
    from elastic_cache.engine import load

    engine = load(options.model, device=options.device, dtype=options.dtype)
    is_terminal = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        # What is not valid is refused as part of its line, and the lines behind it are read.
        encoding = sys.stdin.encoding if is_terminal else "utf-8"
        sys.stdin.reconfigure(encoding=encoding, errors="surrogateescape")
    chat = Chat(engine, settings, read_terminal if is_terminal else read_pipe)
    if not is_terminal:
        return chat.run_through()
    with suppress(ImportError):  # some builds of Python lack it; `input` uses it where it is
        import readline  # noqa: F401
    _tell(_greeting(options.model, settings["policy"]))
    chat.converse()
    return 0


def read_terminal() -> str:
    """The next line typed; EOFError at Ctrl-D, KeyboardInterrupt at Ctrl-C."""
    if sys.stdout.isatty():
        return input(_PROMPT)
    _tell(_PROMPT, end="")  # `input` would write it among the answers
    return input()


def read_pipe() -> str:
    """The next line of standard input; EOFError at its end."""
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


class Chat:
    """One session: reads lines, answers questions and obeys commands.

    Args:
        engine: the loaded model.
        settings: the generation settings to begin with, the policy among them.
        read: gives the next line; EOFError ends the session.

    Raises:
        ValueError: the model has no tokenizer.
    """

    def __init__(self, engine: Engine, settings: dict[str, Any], read: Callable[[], str]) -> None:
        from elastic_cache.cli.conversation import Conversation

        if engine.model.tokenizer is None:
            raise ValueError(f"{engine.model.name!r} has no tokenizer.json: it cannot read a chat")
        self._engine = engine
        self._settings = settings
        self._read = read
        self._conversation = Conversation(engine.model)
        self._is_over = False

    def converse(self) -> None:
        """With somebody at a terminal, who sees every mistake and goes on."""
        interrupts = 0
        while not self._is_over:
            try:
                line = self._read()
                interrupts = 0
                self._take(line)
            except EOFError:
                _tell()
                return
            except KeyboardInterrupt:
                interrupts += 1
                _tell("\nto leave, press Ctrl-D or type /quit" if interrupts > 1 else "")

    def run_through(self) -> int:
        """Every line of a pipe; the exit code says whether one of them was refused."""
        is_refused = False
        with suppress(EOFError):
            while not self._is_over:
                is_refused |= not self._take(self._read())
        return EXIT_ERROR if is_refused else 0

    def _take(self, line: str) -> bool:
        """Does what a line asks for; False after the sentence that says why it cannot be done."""
        from elastic_cache.models.tokenizer import check_text

        line = line.strip()
        try:
            check_text("the line", line)
            if line.startswith("/"):
                self._obey(line)
            elif line:
                self._answer(line)
        except BrokenPipeError:  # nobody reads the answers any more
            raise
        except USER_ERRORS as error:
            _tell(f"error: {sentence(error)}")
            return False
        finally:
            sys.stdout.flush()
        return True

    def _obey(self, line: str) -> None:
        name, *words = line.split()
        if name not in _COMMANDS:
            raise ValueError(f"there is no command {name!r}: {hint(name, _COMMANDS)}")
        command = _COMMANDS[name]
        if words and not command.arguments:
            raise ValueError(f"{name} stands alone on its line, got {' '.join(words)!r} after it")
        command.run(self, words)

    def _answer(self, question: str) -> None:
        talk = self._conversation
        num_dropped = talk.fit(question, self._settings["gen_length"])
        request = self._engine.stream(talk.messages(question, num_dropped), **self._settings)
        if num_dropped:
            del talk.turns[:num_dropped]
            turns = "turn is" if num_dropped == 1 else f"{num_dropped} turns are"
            _tell(
                f"note: the oldest {turns} forgotten, as all of the chat would exceed the model's "
                f"{self._engine.model.config.max_length} tokens"
            )
        is_live = sys.stdin.isatty() and sys.stdout.isatty()
        result = self._show(request) if is_live else self._print(request)
        is_kept = talk.add(question, result)
        if result.finish_reason == "cancelled":
            what = "what stands before the first gap" if is_kept else "nothing of this turn"
            _tell(f"cancelled: {what} is remembered")

    def _show(self, request: Request) -> Generation:
        from elastic_cache.display import printable, show

        try:
            with _noting_interrupts() as is_interrupted:
                return show(request, self._engine.model, is_cancelled=is_interrupted)
        except KeyboardInterrupt:
            result = request.stop("cancelled")
            print(printable(result.text or ""))
            return result

    def _print(self, request: Request) -> Generation:
        """Answers without a view; in a pipe a Ctrl-C goes on to end the program."""
        with _noting_interrupts() as is_interrupted, suppress(KeyboardInterrupt):
            while not is_interrupted() and request.step() is not None:
                pass
        result = request.result if request.is_finished else request.stop("cancelled")
        print(f"{result.text or ''}\n")  # the blank line is the end of the answer
        if is_interrupted() and not sys.stdin.isatty():
            raise KeyboardInterrupt
        return result

    # commands

    def _help(self, words: list[str]) -> None:
        fields = [(f"{name} {c.arguments}".rstrip(), c.help) for name, c in _COMMANDS.items()]
        print(format_fields([*fields, ("Ctrl-C", "cancel the answer, or clear the line")]))

    def _stats(self, words: list[str]) -> None:
        from elastic_cache.cli.conversation import statistics_table

        talk = self._conversation
        if not talk.answers:
            raise ValueError("there are no statistics yet: ask something first")
        print(statistics_table(talk.answers))
        turns = f"{len(talk.turns)} turn{'' if len(talk.turns) == 1 else 's'}"
        limit = self._engine.model.config.max_length
        print(f"history: {turns}, {talk.num_tokens()} of the model's {limit} tokens")

    def _policy(self, words: list[str]) -> None:
        name = {"policy": words.pop(0)} if words and "=" not in words[0] else {}
        settings = {**self._settings, **name, **shared.read_assignments(words)}
        GenerationConfig(**settings)
        self._settings = settings
        print(" ".join(f"{k}={v}" for k, v in settings.items() if v is not None))

    def _clear(self, words: list[str]) -> None:
        self._conversation.turns.clear()
        print("the history is empty")

    def _quit(self, words: list[str]) -> None:
        self._is_over = True


@dataclass(frozen=True)
class _Command:
    """What can be typed after a slash.

    Attributes:
        run: takes the chat and the words after the name.
        arguments: those words, for people; "" if there must be none.
        help: what it does.
    """

    run: Callable[[Chat, list[str]], None]
    arguments: str
    help: str


_COMMANDS = {
    "/help": _Command(Chat._help, "", "this list"),
    "/stats": _Command(Chat._stats, "", "what the last answer and all of them took"),
    "/policy": _Command(
        Chat._policy, "[NAME] [setting=value ...]", "show or change the settings; =none unsets"
    ),
    "/clear": _Command(Chat._clear, "", "forget the questions and answers so far"),
    "/quit": _Command(Chat._quit, "", "leave, as Ctrl-D does"),
}


@contextmanager
def _noting_interrupts() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether there was a Ctrl-C; a second one is raised."""
    count = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        if count > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: count > 0
    finally:
        signal.signal(signal.SIGINT, before)


def _greeting(model: str, policy: str) -> str:
    lines = [f"{model}, policy {policy}; /help lists the commands, Ctrl-D leaves"]
    if model == "tiny":
        lines.append(
            "The embedded model answers arithmetic word problems, one at a time: /clear before "
            "the next."
        )
    return "\n".join(lines)


def _tell(text: str = "", end: str = "\n") -> None:
    """Says something that is no part of an answer."""
    print(text, end=end, file=sys.stderr, flush=True)
