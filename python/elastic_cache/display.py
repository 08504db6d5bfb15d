"""Live view of an answer being denoised, for terminals.

Undecoded positions are dim glyphs, tokens committed since the last frame are highlighted, and one
line below tells step, tokens, speed and which layers were refreshed. The subtle thing: frames are
drawn at most `_FRAMES_PER_SECOND` times a second and the clock is stopped while drawing, so the
numbers are those of the model and not of the terminal.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

if TYPE_CHECKING:
    from elastic_cache.models.weights import Model
    from elastic_cache.request import Request
    from elastic_cache.types import Generation, Step

_FRAMES_PER_SECOND = 30
_STRIP_WIDTH = 16
_STATUS_LINES = 2  # a blank one and the status
_MASK_STYLE, _FRESH_STYLE = "dim", "bold green"
# What a terminal would obey instead of show, such as escape sequences; newline and tab stay.
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if code not in (9, 10)}


@dataclass(frozen=True)
class Glyphs:
    """Characters of the view."""

    mask: str
    reused: str
    refreshed: str
    separator: str


UNICODE = Glyphs(mask="░", reused="·", refreshed="█", separator=" · ")
ASCII = Glyphs(mask="_", reused=".", refreshed="#", separator=" | ")


def show(
    request: Request,
    model: Model,
    console: Console | None = None,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> Generation:
    """Runs a request to its end while showing it; leaves the answer and one line of statistics.

    Args:
        request, model: what is shown.
        console: the terminal; by default the one of standard output.
        is_cancelled: asked before every step; True stops the request ("cancelled"). What was
            decoded by then stays on the screen, with glyphs where something is missing in it.

    Returns:
        The answer; its `seconds` are those of the model, without those of drawing.
    """
    console = console or Console()
    view = View(request, model, ASCII if console.options.ascii_only else UNICODE)
    drawn = seconds = 0.0
    # Some terminals cannot move the cursor: there, only the finished answer is printed.
    is_live = not console.is_dumb_terminal
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            if is_cancelled():
                request.stop("cancelled")
                break
            started = time.perf_counter()
            step = next(request, None)
            now = time.perf_counter()
            seconds += now - started
            if step is None:
                break
            view.add(step, seconds)
            if is_live and now - drawn > 1 / _FRAMES_PER_SECOND:
                live.update(view.frame(console.width, console.height), refresh=True)
                drawn = now
    result = dataclasses.replace(request.result, seconds=seconds)
    is_complete = result.finish_reason in ("eos", "length")
    text = Text(printable(result.text or "")) if is_complete else view.decoded()
    console.print(text, soft_wrap=True)
    console.print(Text(summary(result, seconds, view.glyphs), style="dim"), soft_wrap=True)
    return result


class View:
    """What is known of a running request, and its picture.

    Args:
        request: the request shown; read for its tokens whenever a frame is drawn.
        model: tokenizer, number of layers and EOS id.
        glyphs: characters that the terminal can show.
    """

    def __init__(self, request: Request, model: Model, glyphs: Glyphs) -> None:
        if model.tokenizer is None:
            raise ValueError(f"{model.name!r} has no tokenizer.json: there is no text to show")
        self.glyphs = glyphs
        self._decode: Callable[[Sequence[int]], str] = model.tokenizer.decode
        self._request = request
        self._depth = model.config.num_layers
        self._eos_id = model.config.eos_id
        self._generated = request.prompt.masked.tolist()
        self._masked = list(self._generated)
        self._fresh: set[int] = set()
        self._first_full = self._depth
        self._num_steps = self._num_committed = 0
        self._seconds = 0.0

    def add(self, step: Step, seconds: float) -> None:
        """Takes over a step that ended after `seconds` of generating."""
        for position in step.committed:
            self._masked[position] = False
        self._fresh.update(step.committed)
        self._first_full = min(self._first_full, max(step.first_full_layer, 0))
        self._num_steps = step.index + 1
        self._num_committed += len(step.committed)
        self._seconds = seconds

    def frame(self, width: int, height: int) -> RenderableType:
        """The picture now; what changed since the previous frame is highlighted."""
        text = crop(self._text(len(self._masked)), width, height - _STATUS_LINES)
        picture = Group(text, Text(), self._status())
        self._fresh.clear()
        self._first_full = self._depth
        return picture

    def decoded(self) -> Text:
        """The answer up to its last decoded position, nothing highlighted."""
        self._fresh.clear()
        known = [i for i, is_masked in enumerate(self._masked) if not is_masked]
        return self._text(known[-1] + 1 if known else 0)

    def _text(self, end: int) -> Text:
        """The answer up to its first EOS, and to before the position `end`."""
        start, ids = self._request.prompt.text_start, self._request.tokens().tolist()
        for position in range(start, end):
            # What follows the first EOS will not be part of the answer.
            if ids[position] == self._eos_id and self._generated[position]:
                end = end if self._masked[position] else position
                break
        return answer_text(
            ids[start:end],
            self._masked[start:end],
            [position in self._fresh for position in range(start, end)],
            self._decode,
            self.glyphs.mask,
        )

    def _status(self) -> Text:
        strip, refreshed = layer_strip(self._first_full, self._depth, self.glyphs)
        speed = self._num_committed / self._seconds if self._seconds else 0.0
        parts = (
            f"step {self._num_steps}",
            f"{self._num_committed}/{sum(self._generated)} tokens (+{len(self._fresh)})",
            f"{speed:.0f} tokens/s",
            f"layers {strip} {refreshed}/{self._depth}",
        )
        return Text(self.glyphs.separator.join(parts), no_wrap=True, overflow="crop")


def answer_text(
    ids: Sequence[int],
    masked: Sequence[bool],
    fresh: Sequence[bool],
    decode: Callable[[Sequence[int]], str],
    mask: str,
) -> Text:
    """An answer in progress, styled by position.

    Neighbouring tokens are decoded together, because a character may take several of them.
    """
    text = Text()
    for is_masked, group in groupby(range(len(ids)), key=lambda i: masked[i]):
        run = list(group)
        if is_masked:
            text.append(mask * len(run), style=_MASK_STYLE)
            continue
        tokens = [ids[i] for i in run]
        whole, shown, num_tokens = printable(decode(tokens)), 0, 0
        for is_fresh, part in groupby(run, key=lambda i: fresh[i]):
            num_tokens += len(list(part))
            is_last = num_tokens == len(run)
            # A character begun but not finished decodes to U+FFFD; it belongs to its last token.
            known = whole if is_last else printable(decode(tokens[:num_tokens])).rstrip("\ufffd")
            text.append(whole[shown : len(known)], style=_FRESH_STYLE if is_fresh else "")
            shown = max(shown, len(known))
    return text


def crop(text: Text, width: int, height: int) -> Text:
    """The lines of a text that fit, chosen so that the place being decoded stays in view.

    Lines are cut at the width and not between words: words that are still masks have no ends yet,
    and whole paragraphs would jump when they get them.
    """
    lines = [
        line for paragraph in text.split("\n", allow_blank=True) for line in _fold(paragraph, width)
    ]
    height = max(height, 1)
    decoding = next((i for i, line in enumerate(lines) if _has_mask(line)), len(lines))
    first = max(min(decoding - height // 2, len(lines) - height), 0)
    return Text("\n").join(lines[first : first + height])


def layer_strip(first_full: int, depth: int, glyphs: Glyphs) -> tuple[str, int]:
    """A bar of the layers, refreshed ones filled, and how many those are."""
    refreshed, width = depth - first_full, min(depth, _STRIP_WIDTH)
    filled = -(-refreshed * width // depth)  # a single refreshed layer must not be invisible
    return glyphs.reused * (width - filled) + glyphs.refreshed * filled, refreshed


def summary(result: Generation, seconds: float, glyphs: Glyphs) -> str:
    """One line of statistics of a finished answer that took `seconds` to generate."""
    speed = result.num_tokens / seconds if seconds else 0.0
    parts = [
        f"{result.num_tokens} tokens in {seconds:.2f} s ({speed:.0f} tokens/s)",
        f"{result.nfe} forwards ({result.tokens_per_forward:.2f} each)",
        # Step 0 counts as L + 1 layers of L, as the method's authors count it.
        f"{min(result.update_frequency, 1):.0%} refreshed",
    ]
    if result.finish_reason == "length":
        parts.append("gen_length reached")
    elif result.finish_reason != "eos":
        parts.append(result.finish_reason)
    return glyphs.separator.join(parts)


def printable(text: str) -> str:
    """The text with control characters replaced."""
    return text.translate(_CONTROLS)


def _fold(line: Text, width: int) -> list[Text]:
    """A line cut into pieces of at most `width` terminal cells."""
    line.expand_tabs()
    cuts, used = [], 0
    for i, character in enumerate(line.plain):
        size = cell_len(character)
        if used + size > width:
            cuts.append(i)
            used = 0
        used += size
    return list(line.divide(cuts))


def _has_mask(line: Text) -> bool:
    return any(span.style == _MASK_STYLE for span in line.spans)
