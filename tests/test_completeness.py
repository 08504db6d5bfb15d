"""Every operator of the schema list is in all its places, and every file keeps the house style."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from elastic_cache import ops, reference
from schemas import ROOT, SCHEMAS

PLACES = (
    "csrc/include/elastic_cache/{}.h",
    "csrc/cpu/{}.cpp",
    "csrc/torch/{}.cpp",
    "tests/ops/test_{}.py",
    "benchmarks/bench_{}.py",
)
CUDA_SOURCES = sorted((ROOT / "csrc/cuda").rglob("*.cu"))

FILE_LINES, FUNCTION_LINES, KERNEL_LINES, COLUMNS = 500, 60, 150, 100
PYTHON_FOLDERS = ("python", "tests", "benchmarks", "examples", "training")
NATIVE_FOLDERS = ("csrc", "examples", "tests/cpp")
PYTHON_FILES = sorted(p for folder in PYTHON_FOLDERS for p in (ROOT / folder).rglob("*.py"))
NATIVE_FILES = sorted(
    path
    for folder in NATIVE_FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".h", ".cpp", ".cu", ".cuh"}
)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def has_kernel(op: str, key: str) -> bool:
    """Whether torch would find a kernel; torch 2.11 does not report a failed registration."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"elastic_cache::{op}", key)


@pytest.mark.parametrize("op", SCHEMAS)
@pytest.mark.parametrize("place", PLACES)
def test_file_of_op(op: str, place: str) -> None:
    assert (ROOT / place.format(op)).is_file()


@pytest.mark.parametrize("op", SCHEMAS)
@pytest.mark.parametrize("module", [ops, reference], ids=["ops", "reference"])
def test_function_of_op(op: str, module: object) -> None:
    function = getattr(module, op)
    expected = [argument.name for argument in SCHEMAS[op]]
    assert list(inspect.signature(function).parameters) == expected
    assert inspect.getdoc(function)


def test_no_header_without_op() -> None:
    headers = {path.stem for path in (ROOT / "csrc/include/elastic_cache").glob("*.h")}
    assert headers == {*SCHEMAS, "types"}


@pytest.mark.parametrize("op", SCHEMAS)
@pytest.mark.parametrize("key", ["CPU", "Meta"])
def test_registered_kernel(op: str, key: str) -> None:
    assert has_kernel(op, key)


@pytest.mark.parametrize("op", SCHEMAS)
def test_schema_as_registered(op: str) -> None:
    """What was loaded is what library.cpp says: the build is not older than the source."""
    registered = getattr(torch.ops.elastic_cache, op).default._schema
    assert [a.name for a in registered.arguments] == [a.name for a in SCHEMAS[op]]
    writes = [a.alias_info is not None and a.alias_info.is_write for a in registered.arguments]
    assert writes == [a.is_output for a in SCHEMAS[op]]


VENDOR_PRODUCTS = {"linear", "project_qkv", "output_mlp"}
"""On a GPU these are the vendor's product, alone or between the kernels of other ops."""


@pytest.mark.skipif(not CUDA_SOURCES, reason="csrc/cuda has no kernel yet")
@pytest.mark.parametrize("op", SCHEMAS)
def test_cuda_twin(op: str) -> None:
    if op in VENDOR_PRODUCTS:
        assert "is_cpu()" in (ROOT / f"csrc/torch/{op}.cpp").read_text()
    else:
        assert op in {path.stem for path in CUDA_SOURCES}
    if any(has_kernel(other, "CUDA") for other in SCHEMAS):
        assert has_kernel(op, "CUDA")


@pytest.mark.parametrize("path", PYTHON_FILES + NATIVE_FILES, ids=relative)
def test_size_of_file(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= FILE_LINES
    wide = [number for number, line in enumerate(lines, 1) if len(line) > COLUMNS]
    assert not wide, f"lines over {COLUMNS} columns"


@pytest.mark.parametrize("path", PYTHON_FILES, ids=relative)
def test_size_of_python_functions(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = _length_of_code(node)
            assert length <= FUNCTION_LINES, f"{node.name} has {length} lines"


def _length_of_code(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    first = node.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = (first.end_lineno or 0) - first.lineno + 1 if is_docstring else 0
    return (node.end_lineno or 0) - node.lineno + 1 - docstring


@pytest.mark.parametrize("path", NATIVE_FILES, ids=relative)
def test_size_of_native_functions(path: Path) -> None:
    for header, length in blocks(path.read_text()):
        limit = KERNEL_LINES if "__global__" in header else FUNCTION_LINES
        assert length <= limit, f"{header.strip()[:60]} has {length} lines"


def blocks(text: str) -> Iterator[tuple[str, int]]:
    """What stands before a pair of braces and how many lines the pair has, types left out."""
    text = re.sub(r'"(\\.|[^"\\\n])*"|\'(\\.|[^\'\\\n])\'', '""', text)
    text = re.sub(r"//[^\n]*|^[ \t]*#[^\n]*", "", text, flags=re.MULTILINE)
    open_blocks: list[tuple[str, int]] = []
    header, line = "", 1
    for character in text:
        line += character == "\n"
        if character == "{":
            open_blocks.append((header, line))
        elif character == "}" and open_blocks:
            before, begin = open_blocks.pop()
            if not re.search(r"\b(namespace|struct|class|enum|union|extern)\b", before):
                yield before, line - begin + 1
        header = "" if character in "{};" else header + character


def test_blocks_are_found() -> None:
    """The scanner itself: braces in strings and comments do not count, types are left out."""
    code = 'namespace a {\nint f() {\n  // }\n  g("{");\n  if (x) {\n  }\n}\nstruct B {\n};\n}\n'
    assert [(h.strip(), n) for h, n in blocks(code)] == [("if (x)", 2), ("int f()", 6)]
