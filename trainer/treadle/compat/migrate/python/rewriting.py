"""Puts what was written anew into a program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import libcst as cst

__all__ = ["Rewriting"]

_PRAGMAS = ("# noqa", "# type: ignore", "# pylint:", "# isort:", "# pragma:", "# pyright:", "# ruff:")
Statements = Sequence[cst.BaseSmallStatement]


class Rewriting(cst.CSTTransformer):
    """Puts new statements and expressions in the place of those that they replace.

    Args:
        statements: The new statements of each import statement.
        expressions: The new expression of each.
        arguments: The new arguments of each argument of a call.
    """

    def __init__(
        self,
        statements: Mapping[cst.CSTNode, Statements],
        expressions: Mapping[cst.CSTNode, cst.BaseExpression],
        arguments: Mapping[cst.Arg, Sequence[cst.Arg]],
    ) -> None:
        super().__init__()
        self._statements = statements
        self._expressions = expressions
        self._arguments = arguments
        self._imported: list[set[str]] = []  # by the lines of each block around that are an import and nothing else

    def visit_Module(self, node: cst.Module) -> None:
        self._imported.append(set())

    def visit_IndentedBlock(self, node: cst.IndentedBlock) -> None:
        self._imported.append(set())

    def leave_IndentedBlock(self, original_node: cst.IndentedBlock, updated_node: cst.IndentedBlock) -> Any:
        self._imported.pop()
        return updated_node

    def leave_Attribute(self, original_node: cst.Attribute, updated_node: cst.Attribute) -> Any:
        return self._expressions.get(original_node, updated_node)

    def leave_Name(self, original_node: cst.Name, updated_node: cst.Name) -> Any:
        return self._expressions.get(original_node, updated_node)

    def leave_SimpleString(self, original_node: cst.SimpleString, updated_node: cst.SimpleString) -> Any:
        return self._expressions.get(original_node, updated_node)

    def leave_Arg(self, original_node: cst.Arg, updated_node: cst.Arg) -> Any:
        if original_node not in self._arguments:
            return updated_node
        *first, last = self._arguments[original_node]
        between = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
        last = last.with_changes(comma=updated_node.comma, whitespace_after_arg=updated_node.whitespace_after_arg)
        return cst.FlattenSentinel([*(each.with_changes(comma=between) for each in first), last])

    def leave_SimpleStatementSuite(
        self, original_node: cst.SimpleStatementSuite, updated_node: cst.SimpleStatementSuite
    ) -> Any:
        return updated_node.with_changes(body=self._in_line(original_node.body, updated_node.body))

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> Any:
        only = original_node.body[0]
        if len(original_node.body) > 1 or only not in self._statements:
            self._remember(updated_node.body)
            return updated_node.with_changes(body=self._in_line(original_node.body, updated_node.body))
        end = updated_node.trailing_whitespace
        commented = bool(end.comment) or any(line.comment for line in updated_node.leading_lines)
        lines: list[cst.SimpleStatementLine] = []
        for new in self._statements[only]:
            if self._remember([new]) or commented:
                lines.append(cst.SimpleStatementLine([new]))
        if not lines:
            return cst.RemoveFromParent()
        first = lines[0].with_changes(leading_lines=updated_node.leading_lines)
        said = end.comment.value if end.comment else ""
        about_all = any(pragma in said for pragma in _PRAGMAS)
        lines = [line.with_changes(trailing_whitespace=end) if about_all else line for line in (first, *lines[1:])]
        lines[0] = lines[0].with_changes(trailing_whitespace=end)
        return lines[0] if len(lines) == 1 else cst.FlattenSentinel(lines)

    def _in_line(self, before: Statements, after: Statements) -> Statements:
        """Return the statements of one line, with semicolons, and the new ones among them."""
        if not any(each in self._statements for each in before):
            return after
        new: list[cst.BaseSmallStatement] = []
        for old, updated in zip(before, after):
            replaced = list(self._statements.get(old, [updated]))
            replaced[:-1] = [each.with_changes(semicolon=_SEMICOLON) for each in replaced[:-1]]
            replaced[-1] = replaced[-1].with_changes(semicolon=updated.semicolon)
            new += replaced
        return new

    def _remember(self, body: Statements) -> bool:
        """Note an import that is alone on its line; whether it is the first such in its block."""
        if len(body) != 1 or not isinstance(body[0], cst.Import | cst.ImportFrom):
            return True
        code = cst.Module([]).code_for_node(body[0])
        there = self._imported[-1]
        before = code in there
        there.add(code)
        return not before


_SEMICOLON = cst.Semicolon(whitespace_after=cst.SimpleWhitespace(" "))
