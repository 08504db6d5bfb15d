"""What a chat remembers: the turns that the model is given again, and what its answers cost.

A turn is a question with its answer. The oldest turns are forgotten when the chat template of all
of them, the new question and the answer's masks would exceed the model's length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from elastic_cache.cli.table import format_table

if TYPE_CHECKING:
    from elastic_cache.models.weights import Model
    from elastic_cache.types import Generation, Message


@dataclass(frozen=True)
class Turn:
    """A question and its answer, as the model is given them."""

    question: str
    answer: str


@dataclass
class Conversation:
    """The turns so far, oldest first.

    Attributes:
        model: whose chat template and length count; it has a tokenizer.
        turns: what is remembered.
        answers: every answer of the session, also those that are not among the turns.
    """

    model: Model
    turns: list[Turn] = field(default_factory=list)
    answers: list[Generation] = field(default_factory=list)

    def fit(self, question: str, gen_length: int) -> int:
        """How many of the oldest turns have no room beside the question and its answer.

        Raises:
            ValueError: the text is not valid, or the model's chat template refuses the chat.
        """
        limit = self.model.config.max_length - gen_length
        num_dropped = 0
        while (
            num_dropped < len(self.turns)
            and self._length(self.messages(question, num_dropped)) > limit
        ):
            num_dropped += 1
        return num_dropped

    def messages(self, question: str, num_dropped: int = 0) -> list[Message]:
        """The chat that ends with the question, without the oldest turns."""
        messages: list[Message] = []
        for turn in self.turns[num_dropped:]:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer})
        return [*messages, {"role": "user", "content": question}]

    def add(self, question: str, answer: Generation) -> bool:
        """Takes note of an answer; whether it has become a turn.

        Of an answer that was stopped the turn has the text up to the first position that was not
        decoded: what stands behind a gap may not be what the model would have said. An answer
        without any such text is no turn.
        """
        self.answers.append(answer)
        text = answer.text or ""
        if answer.finish_reason not in ("eos", "length"):
            text = self._text_before_gap(answer)
            if not text.strip():
                return False
        self.turns.append(Turn(question, text))
        return True

    def num_tokens(self) -> int:
        """Length of the remembered turns, and of the header of an answer behind them, in tokens."""
        return self._length(self.messages("")[:-1]) if self.turns else 0

    def _length(self, messages: Sequence[Message]) -> int:
        tokenizer = self.model.tokenizer
        assert tokenizer is not None
        return len(tokenizer.encode(tokenizer.render_chat(messages)))

    def _text_before_gap(self, answer: Generation) -> str:
        config, tokenizer = self.model.config, self.model.tokenizer
        assert tokenizer is not None
        ids = answer.ids[len(answer.ids) - answer.settings["gen_length"] :].tolist()
        ends = (config.mask_id, config.eos_id)
        stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
        return tokenizer.decode(ids[:stop])


def statistics_table(answers: Sequence[Generation]) -> str:
    """The last answer beside all of them; there is at least one."""
    last, count = _figures(answers[-1:]), len(answers)
    names = ("tokens", "seconds", "tokens/s", "forwards", "tokens per forward", "refreshed")
    rows = list(zip(names, last, _figures(answers), strict=True))
    ended = [answer.finish_reason for answer in answers]
    reasons = ", ".join(f"{ended.count(reason)} {reason}" for reason in dict.fromkeys(ended))
    rows.append(("ended by", ended[-1], reasons))
    return format_table(("", "last answer", f"all {count}" if count > 1 else "all"), rows)


def _figures(answers: Sequence[Generation]) -> list[str]:
    tokens = sum(answer.num_tokens for answer in answers)
    seconds = sum(answer.seconds for answer in answers)
    forwards = sum(answer.nfe for answer in answers)
    refreshed = sum(answer.update_frequency * answer.nfe for answer in answers)
    return [
        str(tokens),
        f"{seconds:.2f}",
        f"{tokens / seconds:.1f}" if seconds else "-",
        str(forwards),
        f"{tokens / forwards:.2f}" if forwards else "-",
        # Step 0 counts as L + 1 layers of L, as the method's authors count it.
        f"{min(refreshed / forwards, 1):.0%}" if forwards else "-",
    ]
