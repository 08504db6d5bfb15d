"""The text of an answer whose tokens are decoded in any order, a little more of it every step.

The subtle thing: a character may take several tokens, so a prefix of the tokens may end inside of
one. It decodes to U+FFFD there, which is held back until the tokens behind it decide. What is sent
is then a prefix of every later text, for tokenizers that decode token by token into bytes.
"""

from __future__ import annotations

from itertools import groupby

from elastic_cache.models.weights import Model
from elastic_cache.prompt import Prompt
from elastic_cache.types import Step

MASK = "\u2591"
"""Stands for an undecoded position."""


class AnswerText:
    """Cuts the text of one answer into pieces that are final.

    Args:
        model: tokenizer and special ids. Without a tokenizer all text is empty.
        prompt: the encoded prompt.
    """

    def __init__(self, model: Model, prompt: Prompt) -> None:
        self._tokenizer, config = model.tokenizer, model.config
        self._eos_id, self._mask_id = config.eos_id, config.mask_id
        # Positions count from the start of the text.
        self._start = prompt.text_start
        self._ids: list[int] = prompt.ids[self._start :].tolist()
        self._masked: list[bool] = prompt.masked[self._start :].tolist()
        self._end = len(self._ids)  # the leftmost generated EOS, as far as is known
        self._next = 0  # all positions before it are decoded
        # Tokens before `_next` from a character's start on: all that is not sent, and before it
        # some whose text is, because decoders may treat the first token of a text specially.
        self._tail: list[int] = []
        self._num_context = 0  # so many of them
        self._tail_sent = self._num_sent = 0  # characters: of the tail's text, and of all
        self._held = ""  # the tail's text that is not sent
        # What `provisional` shows: a run of decoded positions has its text at its first one.
        self._pieces = [MASK if masked else "" for masked in self._masked]
        for masked, group in groupby(range(self._end), key=self._masked.__getitem__):
            run = list(group)
            if not masked:
                self._pieces[run[0]] = self._decode(self._ids[run[0] : run[-1] + 1])

    def add(self, step: Step) -> str:
        """Takes over a step; returns the text that is final since."""
        committed = [position - self._start for position in step.committed]
        for position, token in zip(committed, step.tokens, strict=True):
            self._ids[position], self._masked[position] = token, False
            if token == self._eos_id:
                self._end = min(self._end, position)
        delta = self._advance()
        self._draw(committed)
        return delta

    def provisional(self) -> str:
        """What stands behind all the text returned: decoded runs, and `MASK` for the rest."""
        if self._tokenizer is None:
            return ""
        return self._held + "".join(self._pieces[self._next : self._end])

    def rest(self, text: str | None) -> str:
        """What continues the text returned to `text`, the finished answer's."""
        return "" if text is None else text[self._num_sent :]

    def whole(self) -> str | None:
        """The text as it stands, undecoded positions left out; None without a tokenizer."""
        return None if self._tokenizer is None else self._decode(self._ids[: self._end])

    def _advance(self) -> str:
        """Moves on to the first undecoded position."""
        first = self._next
        while self._next < self._end and not self._masked[self._next]:
            self._next += 1
        if self._next == first:
            return ""
        self._tail += self._ids[first : self._next]
        text = self._decode(self._tail)
        delta = text.rstrip("\ufffd")[self._tail_sent :]
        self._num_sent += len(delta)
        self._tail_sent += len(delta)
        self._held = text[self._tail_sent :]
        if delta and not self._held:
            # A character ends here, and one ended where the tail was last cut to size.
            self._tail = self._tail[self._num_context :]
            self._num_context = len(self._tail)
            self._tail_sent = len(self._decode(self._tail))
        return delta

    def _draw(self, committed: list[int]) -> None:
        """Decodes the runs anew that positions behind the prefix have been committed to."""
        done = self._next
        for position in committed:
            if not done <= position < self._end:
                continue
            first, done = position, position + 1
            while not self._masked[first - 1]:  # `_next` is masked
                first -= 1
            while done < self._end and not self._masked[done]:
                done += 1
            text = self._decode(self._ids[first:done])
            self._pieces[first:done] = [text] + [""] * (done - first - 1)

    def _decode(self, ids: list[int]) -> str:
        if self._tokenizer is None:
            return ""
        return self._tokenizer.decode([token for token in ids if token != self._mask_id])
