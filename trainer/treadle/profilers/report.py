"""Tables of numbers that fit the columns of a report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

__all__ = ["WIDTH", "readable", "table"]

WIDTH: Final = 100
"""The columns of a report."""


def _shortened(text: str, width: int) -> str:
    """Cut a long text in its middle: its kind is at the beginning of an action's name, and the hook at the end."""
    if len(text) <= width:
        return text
    end = (width - 1) * 2 // 3
    return f"{text[: width - 1 - end]}…{text[-end:]}"


def readable(action: str) -> str:
    """An action's name without the arguments of a callback, which may be many."""
    return re.sub(r"\{.+\}", "{…}", action)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table with names on the left and numbers on the right, at most ``WIDTH`` columns wide.

    Args:
        header: The titles of the columns.
        rows: The rows: a name, and a number for each other column.
    """
    lines = [header, *rows]
    widths = [max(8, *(len(line[i]) for line in lines)) for i in range(1, len(header))]
    name = min(WIDTH - sum(widths) - 2 * len(widths), max(len(line[0]) for line in lines))
    rule = "-" * (name + sum(widths) + 2 * len(widths))
    text = [
        _shortened(line[0], name).ljust(name)
        + "".join("  " + cell.rjust(width) for cell, width in zip(line[1:], widths, strict=True))
        for line in lines
    ]
    return [rule, text[0], rule, *text[1:], rule]
