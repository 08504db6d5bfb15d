"""The operators as csrc/torch/library.cpp declares them, read from its text.

Reading the text instead of the loaded library lets the completeness test notice an operator that
is declared and not registered.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Argument:
    name: str
    type: str  # as in the schema, without the alias annotation: "Tensor", "Tensor?", "int", "float"
    is_output: bool

    @property
    def is_tensor(self) -> bool:
        return self.type.startswith("Tensor")


def read_schemas() -> dict[str, tuple[Argument, ...]]:
    """Operator name -> its arguments in order."""
    text = (ROOT / "csrc/torch/library.cpp").read_text()
    found = {}
    for definition in re.findall(r"m\.def\(\s*((?:\"[^\"]*\"\s*)+)\)", text):
        schema = "".join(re.findall(r'"([^"]*)"', definition))
        match = re.fullmatch(r"(\w+)\((.*)\) -> \(\)", schema)
        if match is None:
            raise ValueError(f"library.cpp: an op returns nothing, got the schema {schema!r}")
        found[match[1]] = tuple(_argument(text) for text in match[2].split(", "))
    return found


def _argument(text: str) -> Argument:
    kind, name = text.split(" ")
    return Argument(name, re.sub(r"\(\w!\)", "", kind), "!" in kind)


SCHEMAS = read_schemas()
