"""Arithmetic word problems with worked answers that end in "#### N".

The embedded model is trained on them, and they serve as prompts for benchmarks. The numbers of an
answer follow from its question, the wording is drawn freely: so a trained model stays uncertain
about words and commits 2 to 3 tokens per step, like an 8B model on school mathematics.

The subtle thing is the order of the random draws: a seed must give the same problems for ever,
because held-out sets are seeds. Every draw below is therefore made in a fixed order.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field

HELD_OUT_SEED = 2_000_000_000
"""Seed of the problems that no training run sees (training/problems.py keeps below it)."""

_NAMES = (
    "Ava Ben Cara Dan Ella Finn Gina Hugo Iris Jack Kira Liam Maya Noah Olga Paul Quin Rosa Sam "
    "Tara Umar Vera Will Xena Yuri Zoe"
).split()
_ITEMS = (
    "apples books coins pens stamps cards shells beads marbles cookies stickers bottles".split()
)
_CONTAINERS = {
    "box": "boxes",
    "bag": "bags",
    "tray": "trays",
    "pack": "packs",
    "crate": "crates",
    "jar": "jars",
}
_LARGEST = 999
_OPENINGS = (
    *("", "", "First look at this: ", "Next, ", "After that, "),
    *("Now ", "In this step ", "Then ", "Continuing, "),
)
_FINAL = re.compile(r"####\s*(-?\d+)")


def problem(rng: random.Random) -> tuple[str, str]:
    """One question and its worked answer, of 2 to 6 calculations on numbers up to 999."""
    story = _Story(
        rng, rng.choice(_NAMES), rng.choice(_ITEMS), rng.randint(5, 120), rng.randint(2, 6)
    )
    return story.tell()


def problems(seed: int, count: int) -> list[tuple[str, str]]:
    """The `count` problems of a seed; a longer list of one seed begins with the shorter one."""
    rng = random.Random(seed)
    return [problem(rng) for _ in range(count)]


def final_number(text: str) -> int | None:
    """The number after the first "####" of an answer, None if there is none."""
    match = _FINAL.search(text)
    return int(match.group(1)) if match else None


@dataclass
class _Story:
    """A problem in the making: who has how many of what, and what is written so far."""

    rng: random.Random
    name: str
    items: str
    count: int
    num_steps: int
    question: list[str] = field(default_factory=list)
    answer: list[str] = field(default_factory=list)

    def tell(self) -> tuple[str, str]:
        name, items = self.name, self.items
        self.ask(f"{name} has {self.count} {items}.")
        self.answer.append(
            self.pick(
                f"{name} starts with {self.count} {items}.",
                f"At first {name} has {self.count} {items}.",
                f"We begin with {self.count} {items}.",
                f"The starting number is {self.count}.",
                f"There are {self.count} {items} at the start.",
            )
        )
        remaining = self.num_steps
        while remaining:
            operation = _OPERATIONS[self.rng.randrange(len(_OPERATIONS))]
            remaining -= operation(self)
        self.ask(f"How many {items} does {name} have now?")
        closing = self.pick(
            f"So {name} has {self.count} {items} now.",
            f"The answer is {self.count} {items}.",
            f"In the end {name} has {self.count}.",
            f"That leaves {self.count} {items} for {name}.",
        )
        self.answer.append(f"{closing}\n#### {self.count}")
        return " ".join(self.question), "\n".join(s[0].upper() + s[1:] for s in self.answer)

    def pick(self, *options: str) -> str:
        return self.rng.choice(options)

    def ask(self, sentence: str) -> None:
        self.question.append(sentence)

    def explain(self, result: int, *parts: str | tuple[str, ...]) -> bool:
        """Writes a line that ends with the new count; a tuple means one of its options."""
        line = self.pick(*_OPENINGS)
        for part in parts:
            line += part if isinstance(part, str) else self.pick(*part)
        line += self.pick(
            f"That makes {result}.",
            f"The new total is {result}.",
            f"{self.name} has {result} now.",
            f"So we have {result} {self.items}.",
            f"This gives {result}.",
            f"Now there are {result}.",
            f"We keep {result} in mind.",
        )
        self.answer.append(line)
        self.count = result
        return True


# An operation draws its numbers, gives up (False) where the count would leave 1 to 999 or would
# not be whole, and otherwise writes a sentence of the question and a line of the answer (True).


def _gain(s: _Story) -> bool:
    x, amount = s.count, s.rng.randint(2, 99)
    if x + amount > _LARGEST:
        return False
    verb = s.pick("buys", "finds", "wins", "gets")
    s.ask(f"Then {s.name} {verb} {amount} more {s.items}.")
    reasons = (
        f"we add {amount} because {s.name} {verb} more",
        f"{s.name} {verb} {amount} more",
        f"the count goes up by {amount}",
        f"adding {amount} to {x}",
    )
    return s.explain(x + amount, reasons, f": {x}+{amount}={x + amount}. ")


def _lose(s: _Story) -> bool:
    x = s.count
    if x < 6:
        return False
    amount = s.rng.randint(2, min(99, x - 1))
    verb = s.pick("sells", "loses", "gives away")
    s.ask(f"Then {s.name} {verb} {amount} {s.items}.")
    reasons = (
        f"we subtract {amount} because {s.name} {verb} them",
        f"{s.name} {verb} {amount}",
        f"the count goes down by {amount}",
        f"taking {amount} from {x}",
    )
    return s.explain(x - amount, reasons, f": {x}-{amount}={x - amount}. ")


def _gain_containers(s: _Story) -> bool:
    x, number, each = s.count, s.rng.randint(2, 9), s.rng.randint(3, 30)
    amount = number * each
    if x + amount > _LARGEST:
        return False
    container = s.pick(*_CONTAINERS)
    plural = _CONTAINERS[container]
    s.ask(f"Then {s.name} buys {number} {plural} with {each} {s.items} in each {container}.")
    products = (
        f"the {plural} hold {number}*{each}={amount}",
        f"{number} {plural} of {each} are {number}*{each}={amount}",
        f"we multiply {number}*{each}={amount}",
    )
    sums = ("Adding them", "So the sum is", "Together that is")
    return s.explain(x + amount, products, ". ", sums, f": {x}+{amount}={x + amount}. ")


def _double(s: _Story) -> bool:
    x = s.count
    if x * 2 > _LARGEST:
        return False
    s.ask(f"Then {s.name} doubles the number of {s.items}.")
    reasons = ("doubling gives", "twice as many is", "we multiply by two")
    return s.explain(x * 2, reasons, f": {x}*2={2 * x}. ")


def _halve(s: _Story) -> bool:
    x = s.count
    if x % 2 or x < 8:
        return False
    s.ask(f"Then {s.name} gives half of the {s.items} to a friend.")
    reasons = ("half goes to a friend", "we divide by two", "one half stays")
    return s.explain(x // 2, reasons, f": {x}/2={x // 2}. ")


def _give_to_friends(s: _Story) -> bool:
    x, number, each = s.count, s.rng.randint(2, 6), s.rng.randint(2, 12)
    amount = number * each
    if amount >= x:
        return False
    s.ask(f"Then {s.name} gives {each} {s.items} to each of {number} friends.")
    products = (
        f"the friends get {number}*{each}={amount}",
        f"{number} friends with {each} each take {number}*{each}={amount}",
        f"we multiply {number}*{each}={amount}",
    )
    rests = ("Taking them away", "So what is left is", "The rest is")
    return s.explain(x - amount, products, ". ", rests, f": {x}-{amount}={x - amount}. ")


def _gift(s: _Story) -> bool:
    x, friend = s.count, s.pick(*_NAMES)
    base, more = s.rng.randint(2, 60), s.rng.randint(1, 20)
    amount = base + more
    if friend == s.name or x + amount > _LARGEST:
        return False
    s.ask(f"{friend} has {more} more {s.items} than {base} and gives all of them to {s.name}.")
    gifts = (
        f"{friend} has {base}+{more}={amount}",
        f"the gift from {friend} is {base}+{more}={amount}",
        f"we work out {base}+{more}={amount}",
    )
    sums = ("After the gift", "Adding the gift", "So the sum is")
    return s.explain(x + amount, gifts, ". ", sums, f": {x}+{amount}={x + amount}. ")


def _keep_one_pile(s: _Story) -> bool:
    x, piles = s.count, s.rng.choice((3, 4, 5))
    if x % piles or x < 3 * piles:
        return False
    s.ask(f"Then {s.name} puts the {s.items} into {piles} equal piles and keeps only one pile.")
    reasons = (f"one pile of {piles} is", f"we divide by {piles}", "each pile has")
    return s.explain(x // piles, reasons, f": {x}/{piles}={x // piles}. ")


_OPERATIONS: tuple[Callable[[_Story], bool], ...] = (
    _gain,
    _lose,
    _gain_containers,
    _double,
    _halve,
    _give_to_friends,
    _gift,
    _keep_one_pile,
)
