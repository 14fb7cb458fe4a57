"""The size budgets: a newcomer reads any file in one sitting and any function on one screen or two."""

from __future__ import annotations

import ast

from tests.architecture.sources import PACKAGES, ROOT, FunctionNode, files, functions, tree, where

FILE_LINES = 600
FACADE_LINES = 1000
FUNCTION_LINES = 60
ATTRIBUTES = 15
FILES_IN_A_FOLDER = 12

FACADES = {"treadle_fabric.fabric": "Fabric", "treadle.trainer.trainer": "Trainer"}
# Folders with one file a callback, logger, environment, precision or strategy, and those of re-exports.
UNCOUNTED = {
    "treadle.callbacks",
    "treadle.utilities",
    "treadle_fabric.environments",
    "treadle_fabric.loggers",
    "treadle_fabric.precision",
    "treadle_fabric.strategies",
    "treadle_fabric.utilities",
}


def docstring_lines(node: FunctionNode) -> int:
    if ast.get_docstring(node, clean=False) is None:
        return 0
    return node.body[0].end_lineno - node.body[0].lineno + 1


def body_lines(node: FunctionNode) -> int:
    """The lines of a function without its signature and docstring."""
    body = node.body[1:] if docstring_lines(node) else node.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def attributes_set(constructor: FunctionNode) -> set[str]:
    """The attributes of ``self`` that a constructor assigns."""
    targets = [
        target
        for node in ast.walk(constructor)
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    ]
    return {
        each.attr
        for target in targets
        for each in ast.walk(target)
        if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name) and each.value.id == "self"
    }


def test_files() -> None:
    assert files()
    over = {
        where(file): length
        for name, file in files().items()
        if (length := file.read_text(encoding="utf-8").count("\n")) > (FACADE_LINES if name in FACADES else FILE_LINES)
    }
    assert not over, f"files over {FILE_LINES} lines (facades: {FACADE_LINES}): {over}"


def test_functions() -> None:
    over = {
        f"{where(file, node)} {node.name}": length
        for file in files().values()
        for node in functions(file)
        if (length := body_lines(node)) > FUNCTION_LINES
    }
    assert not over, f"functions over {FUNCTION_LINES} lines, signature and docstring not counted: {over}"


def test_constructors() -> None:
    over = {
        where(file, node): sorted(found)
        for name, file in files().items()
        for cls in ast.walk(tree(file))
        if isinstance(cls, ast.ClassDef) and FACADES.get(name) != cls.name
        for node in cls.body
        if isinstance(node, FunctionNode)
        and node.name == "__init__"
        and len(found := attributes_set(node)) > ATTRIBUTES
    }
    assert not over, f"constructors that set more than {ATTRIBUTES} attributes: {over}"


def test_folders() -> None:
    counts = {
        ".".join(folder.relative_to(root.parent).parts): len(list(folder.glob("*.py")))
        for root in PACKAGES.values()
        for folder in (root, *(path for path in root.rglob("*") if path.is_dir() and path.name != "__pycache__"))
    }
    over = {name: count for name, count in counts.items() if count > FILES_IN_A_FOLDER and name not in UNCOUNTED}
    assert not over, f"folders with more than {FILES_IN_A_FOLDER} files: {over}"
    assert counts.keys() >= UNCOUNTED, "UNCOUNTED names a folder that is not there any more"


def test_every_folder_says_what_lives_there() -> None:
    without = [
        where(file) for file in files().values() if file.name == "__init__.py" and not ast.get_docstring(tree(file))
    ]
    assert not without, f"packages without a docstring: {without}"
    empty = [
        str(folder.relative_to(ROOT))
        for root in PACKAGES.values()
        for folder in root.rglob("*")
        if list(folder.glob("*.py")) and not (folder / "__init__.py").exists()
    ]
    assert not empty, f"folders without an __init__.py: {empty}"
