"""Makes the table of layers as narrow as the terminal."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import Final

__all__ = ["Column", "fit_columns", "width_of"]

Column = tuple[str, list[str]]
"""A heading, and a cell for each layer; a cell may have several lines."""

_LAYER: Final = ("Name", "Type")
_SIZES: Final = ("In sizes", "Out sizes")
_SIZES_HEADING: Final = "In -> Out sizes"
_NARROWEST: Final = 12
_WHOLE_SHAPE: Final = 20
_MOST_LINES: Final = 5  # of the sizes of one layer
_SHAPE: Final = re.compile(r"\[[\d, ]*\]")
_HELD: Final = "\N{NO-BREAK SPACE}"


def width_of(column: Column) -> int:
    """Return the number of characters that the longest line of a column takes."""
    heading, cells = column
    return max(len(line) for cell in (heading, *cells) for line in (cell.split("\n") or [""]))


def fit_columns(columns: Sequence[Column], width: int, between: int, around: int = 0) -> list[Column]:
    """Return the columns of a table so that it fits into a width.

    As much is done as is needed: names become a tree, in which each layer has the last part of its name; the type comes
    below the name, and the sizes of the output below those of the input; at last, names and types lose their middle.
    Other columns than those of the summary stay as they are.

    Args:
        columns: the columns of the summary.
        width: how many characters a line has.
        between: how many of them are between two columns.
        around: how many of them are to the left and right of the table.
    """

    def spare(columns: Sequence[Column]) -> int:
        return width - around - between * (len(columns) - 1) - sum(width_of(column) for column in columns)

    fitted = list(columns)
    if spare(fitted) < 0:
        fitted = [(h, _as_tree(cells)) if h == "Name" else (h, cells) for h, cells in fitted]
    headings = [heading for heading, _ in fitted]
    if spare(fitted) < 0 and all(heading in headings for heading in (*_LAYER, *_SIZES)):
        fitted = _stacked(fitted)
    if (missing := -spare(fitted)) > 0:
        fitted = _narrowed(fitted, missing)
    return fitted


def _as_tree(names: Sequence[str]) -> list[str]:
    """Return the last part of each dotted name, indented below the layer that it belongs to."""
    seen: set[str] = set()
    cells = []
    for name in names:
        parent, _, last = name.rpartition(".")
        inside = parent in seen
        seen.add(name)
        cells.append(f"{'  ' * name.count('.')}{last}" if inside else name)
    return cells


def _stacked(columns: Sequence[Column]) -> list[Column]:
    """Put the type below the name, and the sizes into one column."""
    by_heading = dict(columns)
    names, types = (by_heading[heading] for heading in _LAYER)
    layers = [
        name if kind == "n/a" else f"{name}\n{' ' * (len(name) - len(name.lstrip()))}({kind})"
        for name, kind in zip(names, types, strict=True)
    ]
    inputs, outputs = (by_heading[heading] for heading in _SIZES)
    sizes = [
        each if each == other and each in ("?", "n/a") else f"{each}\n-> {other}"
        for each, other in zip(inputs, outputs, strict=True)
    ]
    new = {"Name": ("Layer (type)", layers), "In sizes": (_SIZES_HEADING, sizes)}
    return [new.get(heading, (heading, cells)) for heading, cells in columns if heading not in ("Type", "Out sizes")]


def _narrowed(columns: Sequence[Column], missing: int) -> list[Column]:
    """Take ``missing`` characters away: of sizes as long as no shape is broken, then of the wider of the columns."""
    long = {h: width_of((h, cells)) for h, cells in columns if h in ("Name", "Type", "Layer (type)", _SIZES_HEADING)}
    for _ in range(missing):
        widest = max(long, key=lambda heading: long[heading], default=None)
        if long.get(_SIZES_HEADING, 0) > _WHOLE_SHAPE:
            widest = _SIZES_HEADING
        if widest is None or long[widest] <= _NARROWEST:
            break
        long[widest] -= 1
    result = []
    for heading, cells in columns:
        if heading == _SIZES_HEADING:
            cells = [_wrapped(cell, long[heading]) for cell in cells]
        elif heading in long:
            cells = ["\n".join(_shortened(line, long[heading]) for line in cell.split("\n")) for cell in cells]
        result.append((heading, cells))
    return result


def _wrapped(sizes: str, width: int) -> str:
    """Break lines of sizes between shapes; what takes too many lines is cut."""
    lines = []
    for line in sizes.split("\n"):
        held = _SHAPE.sub(lambda shape: shape[0].replace(" ", _HELD), line).replace("->" + " ", "->" + _HELD)
        indent = "   " if line.startswith("->") else " "
        pieces = textwrap.wrap(held, width, subsequent_indent=indent, break_on_hyphens=False) or [""]
        lines += pieces if len(pieces) <= _MOST_LINES else [*pieces[: _MOST_LINES - 1], f"{indent}..."]
    return "\n".join(lines).replace(_HELD, " ")


def _shortened(text: str, width: int) -> str:
    """Return a text without its middle, where it is too long; its indentation goes first."""
    indent = len(text) - len(text.lstrip())
    text = " " * min(indent, max(width - len(text.lstrip()), width // 3)) + text.lstrip() if len(text) > width else text
    if len(text) <= width:
        return text
    first = (width - 3 + 1) // 2
    return f"{text[:first]}...{text[len(text) - (width - 3 - first) :]}"
