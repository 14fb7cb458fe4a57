"""The size budgets: a newcomer reads any file in one sitting and any function on one screen or two."""

from __future__ import annotations

import ast

from tests.architecture.sources import FunctionNode, files, functions, where

FILE_LINES = 600
FUNCTION_LINES = 80
CONSTRUCTOR_LINES = 60


def docstring_lines(node: FunctionNode) -> int:
    if ast.get_docstring(node, clean=False) is None:
        return 0
    return node.body[0].end_lineno - node.body[0].lineno + 1


def body_lines(node: FunctionNode) -> int:
    body = node.body[1:] if docstring_lines(node) else node.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def test_files() -> None:
    assert files()
    lengths = {where(file): file.read_text(encoding="utf-8").count("\n") + 1 for file in files().values()}
    over = {file: length for file, length in lengths.items() if length > FILE_LINES}
    assert not over, f"files over {FILE_LINES} lines: {over}"


def test_functions() -> None:
    over = {
        f"{where(file, node)} {node.name}": length
        for file in files().values()
        for node in functions(file)
        if (length := node.end_lineno - node.lineno + 1 - docstring_lines(node)) > FUNCTION_LINES
    }
    assert not over, f"functions over {FUNCTION_LINES} lines, docstring not counted: {over}"


def test_constructors() -> None:
    over = {
        where(file, node): length
        for file in files().values()
        for node in functions(file)
        if node.name == "__init__" and (length := body_lines(node)) > CONSTRUCTOR_LINES
    }
    assert not over, f"constructor bodies over {CONSTRUCTOR_LINES} lines, docstring not counted: {over}"
