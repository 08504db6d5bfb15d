"""Text in final pieces: whatever is decoded in whatever order, the pieces joined are the answer."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import elastic_cache
import pytest
import tokenizers
import torch
from elastic_cache.answer_text import MASK, AnswerText
from elastic_cache.models.tokenizer import Tokenizer, load_tokenizer
from elastic_cache.prompt import Prompt
from elastic_cache.types import Step
from hypothesis import given, settings
from hypothesis import strategies as st

EOS_ID, MASK_ID, VOCABULARY = 1, 2, 768


def load_embedded() -> Tokenizer:
    tokenizer = load_tokenizer(Path(elastic_cache.__file__).parent / "data/tiny-llada")
    assert tokenizer is not None
    return tokenizer


SOME_BYTES = sorted(set(load_embedded().encode("é░😀 a")))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_embedded()


def model_of(tokenizer: Tokenizer | None) -> Any:
    return SimpleNamespace(
        tokenizer=tokenizer, config=SimpleNamespace(eos_id=EOS_ID, mask_id=MASK_ID)
    )


def prompt_of(ids: list[int], text_start: int) -> Prompt:
    tensor = torch.tensor(ids)
    return Prompt(tensor, tensor == MASK_ID, text_start)


def step_of(committed: dict[int, int]) -> Step:
    positions = sorted(committed)
    return Step(
        index=0,
        first_full_layer=0,
        committed=positions,
        tokens=[committed[position] for position in positions],
        confidence=[1.0] * len(positions),
        tracked=[],
        similarity=[],
        num_rows=1,
        num_masked=1,
    )


class Answer:
    """The whole text decoded anew every time, as `Request` does it in the end."""

    def __init__(self, prompt: Prompt, tokenizer: Tokenizer) -> None:
        self.ids: list[int] = prompt.ids.tolist()
        self.generated: list[bool] = prompt.masked.tolist()
        self.masked = list(self.generated)
        self.start = prompt.text_start
        self.decode = tokenizer.decode

    def add(self, committed: dict[int, int]) -> None:
        for position, token in committed.items():
            self.ids[position], self.masked[position] = token, False

    def end(self) -> int:
        ends = [i for i, token in enumerate(self.ids) if token == EOS_ID and self.generated[i]]
        return min(ends, default=len(self.ids))

    def text(self) -> str:
        return self.decode([i for i in self.ids[self.start : self.end()] if i != MASK_ID])

    def prefix(self) -> str:
        end = self.end()
        first = next((i for i in range(self.start, end) if self.masked[i]), end)
        return self.decode([i for i in self.ids[self.start : first] if i != MASK_ID])

    def picture(self) -> str:
        positions = range(self.start, self.end())
        runs = [(hole, list(run)) for hole, run in groupby(positions, self.masked.__getitem__)]
        return "".join(
            MASK * len(run) if hole else self.decode([self.ids[i] for i in run])
            for hole, run in runs
        )


@st.composite
def decodings(draw: st.DrawFn) -> tuple[list[int], int, list[dict[int, int]]]:
    """A prompt, where its text starts, and what the steps commit; an EOS drops what is behind."""
    # The bytes of "é", "░" and "😀" are tokens of their own here; in and out of order.
    some_bytes = st.sampled_from([*SOME_BYTES, EOS_ID, 0, 5, 700])
    token = st.one_of(some_bytes, some_bytes, st.integers(0, VOCABULARY - 1))
    given_ids = draw(st.lists(st.one_of(token, st.just(MASK_ID)), min_size=1, max_size=24))
    num_answer = draw(st.integers(0 if MASK_ID in given_ids else 1, 24))
    ids = given_ids + [MASK_ID] * num_answer
    left = draw(st.permutations([i for i, value in enumerate(ids) if value == MASK_ID]))
    steps, cut = [], len(ids)
    while left:
        taken, left = left[: draw(st.integers(1, 4))], left
        left = left[len(taken) :]
        steps.append({position: draw(token) for position in taken})
        ends = [position for position in taken if steps[-1][position] == EOS_ID]
        cut = min([cut, *ends])
        left = [position for position in left if position < cut]
    return ids, 0 if MASK_ID in given_ids else len(given_ids), steps


@settings(max_examples=400, deadline=None)
@given(case=decodings())
def test_pieces_joined_are_the_text_after_every_step(
    tokenizer: Tokenizer, case: tuple[list[int], int, list[dict[int, int]]]
) -> None:
    ids, start, steps = case
    prompt = prompt_of(ids, start)
    text, answer = AnswerText(model_of(tokenizer), prompt), Answer(prompt, tokenizer)
    assert text.whole() == answer.text()
    sent = ""
    for committed in steps:
        sent += text.add(step_of(committed))
        answer.add(committed)
        # Nothing less than what is sure, and only that.
        assert sent == answer.prefix().rstrip("\ufffd")
        assert sent + text.provisional() == answer.picture()
        assert sent + text.rest(answer.text()) == answer.text() == text.whole()


def test_the_tokens_drawn_do_make_characters_of_several(tokenizer: Tokenizer) -> None:
    """What the property above is worth depends on it."""
    assert len(tokenizer.encode("é░😀")) == 9
    assert tokenizer.decode(tokenizer.encode("é░😀")[2:4]) == "\ufffd"


def test_a_character_is_held_back_until_it_is_whole(tokenizer: Tokenizer) -> None:
    smile = tokenizer.encode("a😀")
    text = AnswerText(model_of(tokenizer), prompt_of([9] + [MASK_ID] * 6, 1))
    assert text.add(step_of({1: smile[0], 2: smile[1]})) == "a"
    assert text.provisional() == "\ufffd" + MASK * 4
    assert text.add(step_of({4: smile[3]})) == ""
    assert text.add(step_of({3: smile[2]})) == ""
    assert text.add(step_of({5: smile[4]})) == "😀"
    assert text.provisional() == MASK


def test_a_broken_character_at_the_end_belongs_to_the_text(tokenizer: Tokenizer) -> None:
    smile = tokenizer.encode("😀")
    text = AnswerText(model_of(tokenizer), prompt_of([9] + [MASK_ID] * 2, 1))
    assert text.add(step_of({1: smile[0], 2: EOS_ID})) == ""
    assert text.rest("\ufffd") == "\ufffd"


def test_text_behind_an_eos_is_not_shown(tokenizer: Tokenizer) -> None:
    (letter,) = tokenizer.encode("a")
    text = AnswerText(model_of(tokenizer), prompt_of([9] + [MASK_ID] * 8, 1))
    text.add(step_of({7: letter}))
    assert text.provisional() == MASK * 6 + "a" + MASK
    text.add(step_of({4: EOS_ID}))
    assert text.provisional() == MASK * 3
    text.add(step_of({3: letter}))
    assert text.provisional() == MASK * 2 + "a"


def test_an_eos_that_was_given_ends_nothing(tokenizer: Tokenizer) -> None:
    a, b = tokenizer.encode("a") + tokenizer.encode("b")
    text = AnswerText(model_of(tokenizer), prompt_of([a, EOS_ID, MASK_ID, b], 0))
    assert text.provisional() == "a" + MASK + "b"
    assert text.add(step_of({2: a})) == "aab"


def test_tokenizers_that_write_spaces_before_words() -> None:
    """Metaspace drops the space before a text's first word, wherever that text was cut from."""
    words = ["\u2581so", "\u2581it", "\u2581goes", "<s>"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: 10 + i for i, word in enumerate(words)}, "<s>")
    )
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.add_special_tokens(["<s>"])
    model = model_of(Tokenizer(backend))
    text = AnswerText(model, prompt_of([9] + [MASK_ID] * 5, 1))
    deltas = [text.add(step_of({1 + i: token})) for i, token in enumerate([10, 13, 11, 13, 12])]
    assert deltas == ["so", "", " it", "", " goes"]
    assert "".join(deltas) == text.whole() == "so it goes"


def test_a_committed_mask_id_is_no_text() -> None:
    """As in `Generation.text`, also where the tokenizer takes the mask for a word."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"hole": MASK_ID, "so": 10}, "so"))
    text = AnswerText(model_of(Tokenizer(backend)), prompt_of([9] + [MASK_ID] * 3, 1))
    assert text.add(step_of({1: MASK_ID, 2: 10})) == "so"
    assert text.whole() == "so"


def test_no_tokenizer_no_text() -> None:
    text = AnswerText(model_of(None), prompt_of([9] + [MASK_ID] * 3, 1))
    assert text.add(step_of({1: 20})) == ""
    assert text.provisional() == ""
    assert text.rest(None) == ""
    assert text.whole() is None
