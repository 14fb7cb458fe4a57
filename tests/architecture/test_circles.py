"""The import graph has no circle: imports for type checkers and inside functions count, too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

import pytest
from tests.architecture.sources import PACKAGES, files, tree, where

# The one file that may name classes of higher layers, for type checkers only.
UPWARDS = "treadle.contracts"
# These import a part of theirs, which takes time or needs an extra, when one of its names is asked for.
ON_DEMAND = (
    "treadle",
    "treadle.callbacks",
    "treadle.cli",
    "treadle.profilers",
    "treadle.searches",
    "treadle.utilities",
    "treadle_fabric",
    "treadle_fabric.accelerators",
    "treadle_fabric.checkpoint",
    "treadle_fabric.environments",
    "treadle_fabric.estimating",
    "treadle_fabric.failures",
    "treadle_fabric.loggers",
    "treadle_fabric.precision",
    "treadle_fabric.strategies",
    "treadle_fabric.utilities",
)
RE_EXPORTED = {
    "treadle.accelerators",
    "treadle.plugins",
    "treadle.plugins.environments",
    "treadle.plugins.io",
    "treadle.plugins.precision",
    "treadle.strategies",
    "treadle_fabric",
    "treadle_fabric.plugins",
    "treadle_fabric.plugins.environments",
    "treadle_fabric.plugins.io",
    "treadle_fabric.plugins.precision",
}  # which have such names from one of these packages


def imported(module: str) -> Iterator[tuple[ast.ImportFrom | ast.Import, str]]:
    """Each import of a module of ours in ``module``, and what it imports."""
    for node in ast.walk(tree(files()[module])):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield node, full if full in files() else node.module
        elif isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)


def test_no_circle() -> None:
    graph = {
        module: {found for _, found in imported(module) if found in files() and found != module} for module in files()
    }
    assert graph[UPWARDS], f"{UPWARDS} imports nothing, so this test leaves out what need not be left out"
    graph[UPWARDS] = set()
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("a circle of imports: " + " -> ".join(reversed(error.args[1])))


def under_type_checking(module: str) -> set[ast.AST]:
    found: set[ast.AST] = set()
    for node in ast.walk(tree(files()[module])):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            found |= {inner for statement in node.body for inner in ast.walk(statement)}
    return found


def test_annotations_import_upwards_in_one_file_only() -> None:
    """Where an import is for type checkers only, it is one of ``contracts.py``: anything else can be a plain import."""
    bad = [
        f"{where(files()[module], node)}: {found}"
        for module in files()
        if module != UPWARDS
        for node, found in imported(module)
        if module not in ON_DEMAND or not found.startswith(f"{module}.")
        if module not in RE_EXPORTED or (found.rpartition(".")[0] not in ON_DEMAND and found not in ON_DEMAND)
        if node in under_type_checking(module) and found.split(".")[0] in PACKAGES and found != UPWARDS
    ]
    assert not bad, f"imports under TYPE_CHECKING: {bad}"


def test_an_import_inside_a_function_gives_its_reason() -> None:
    """It is there because it is heavy or not on every system, which a comment on its line or above it says."""
    bad = []
    for file in files().values():
        lines = file.read_text(encoding="utf-8").splitlines()
        for function in ast.walk(tree(file)):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    near = lines[max(node.lineno - 3, 0) : node.end_lineno]
                    if not any("#" in line for line in near):
                        bad.append(where(file, node))
    assert not bad, f"imports inside functions without a reason: {sorted(set(bad))}"
