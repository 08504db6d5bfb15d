"""Imports only go down the list of docs/architecture.md, and one file crosses each border.

Every import counts, also those inside functions and under TYPE_CHECKING: what a reader must know.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from schemas import ROOT

PACKAGE = ROOT / "python/elastic_cache"

LAYERS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli", "lm_eval"),
    ("lab", "server"),
    ("service",),
    ("ticket",),
    ("events", "answer_text"),
    ("display", "lm_eval_args"),
    ("engine",),
    ("batch",),
    ("readout", "turns"),
    ("request",),
    ("prompt",),
    ("policies",),
    ("runner",),
    ("shape",),
    ("decoding",),
    ("forward",),
    ("buffers",),
    ("cache",),
    ("models",),
    ("state",),
    ("plan", "report"),
    ("ops", "device"),
    ("native",),
    ("reference",),
    ("config", "types", "errors", "env", "graphs", "memory", "problems"),
)
"""From the edges down. A name is a module or a package, inside of which imports are free."""

RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
EDGES = {"__main__", "cli", "server"}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def module_name(path: Path) -> str:
    return str(path.relative_to(PACKAGE).with_suffix(""))


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_layers(path: Path) -> Iterator[tuple[int, str]]:
    """Line and top-level name inside the package of every import; "" is the package itself."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(path, node)
            names = [base] if base != "elastic_cache" else [f"{base}.{a.name}" for a in node.names]
        else:
            continue
        for parts in (name.split(".") for name in names):
            if parts[0] == "elastic_cache":
                is_module = len(parts) > 1 and (PACKAGE / parts[1]).with_suffix(".py").exists()
                is_package = len(parts) > 1 and (PACKAGE / parts[1]).is_dir()
                yield node.lineno, parts[1] if is_module or is_package else ""


def _absolute(path: Path, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    parents = ["elastic_cache", *path.relative_to(PACKAGE).parts[:-1]]
    kept = parents[: len(parents) - node.level + 1]
    return ".".join([*kept, *([node.module] if node.module else [])])


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_only_go_down(path: Path) -> None:
    own = layer_of(path)
    assert own in RANK, f"{own} has no place in LAYERS: put it where its imports allow"
    for line, other in imported_layers(path):
        if other == "":
            assert own in EDGES, f"{path.name}:{line} imports the whole package; only edges may"
        elif other != own:
            assert RANK[other] > RANK[own], f"{path.name}:{line}: {own} must not import {other}"


def uses(path: Path) -> set[str]:
    """Dotted names `module.attribute` that a file uses or imports: torch.ops, os.environ, ..."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_one_file_for_each_border(path: Path) -> None:
    names = uses(path)
    if module_name(path) != "native":
        assert "torch.ops" not in names, "only native.py looks into torch.ops"
    if module_name(path) != "env":
        found = names & {"os.environ", "os.getenv", "os.putenv"}
        assert not found, "environment variables are read in env.py only"
    if module_name(path) != "lm_eval":
        found = {name for name in names if name.split(".")[0] == "lm_eval"}
        assert not found, "only lm_eval.py imports the harness, which is optional"


def native_sources() -> list[Path]:
    suffixes = {".h", ".cpp", ".cu", ".cuh"}
    return sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in suffixes)


def test_torch_headers_stay_in_csrc_torch() -> None:
    pattern = re.compile(r'#\s*include\s*[<"](torch|ATen|c10)/')
    found = [p for p in native_sources() if pattern.search(p.read_text())]
    strays = [str(p.relative_to(ROOT)) for p in found if p.parent != ROOT / "csrc/torch"]
    assert found and not strays


def test_launches_stay_in_csrc_cuda() -> None:
    cuda = ROOT / "csrc/cuda"
    found = [p for p in native_sources() if "<<<" in p.read_text() and cuda not in p.parents]
    assert not found


def test_public_headers_stand_alone() -> None:
    """include/ needs the standard library and itself: C++ users have nothing else."""
    include = ROOT / "csrc/include"
    for path in include.rglob("*.h"):
        for name in re.findall(r'#include "([^"]+)"', path.read_text()):
            assert (include / name).exists(), f"{path.name} includes {name}"
