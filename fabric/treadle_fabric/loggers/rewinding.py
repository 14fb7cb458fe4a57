"""Take ``metrics.csv`` back to what it held when a checkpoint was saved; what is cut goes to a file beside it.

The rows that a checkpoint has are its first rows, but values of later steps may have been merged into them since.
Before that happens, a journal notes what a row looked like.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from treadle_fabric.loggers.files import read_file
from treadle_fabric.loggers.run_folder import RunFolder

__all__ = ["JOURNAL", "Journal", "Rewound", "cut_journal", "encode", "holds_rows", "rewind"]

SUPERSEDED: Final = "metrics_superseded.csv"
JOURNAL: Final = ".metrics_before_merges.jsonl"
_ADDED: Final = ("resume", "global_step", "written")
"""The columns of the side file before those of ``metrics.csv``: the number of the resume, the optimizer steps of its
checkpoint, and when the cut file was written last."""


class Journal:
    """What rows that a checkpoint has looked like before later values were merged into them.

    Args:
        count: The number of entries so far.
        rows: The number of rows that the newest checkpoint has. Later rows are not noted: no checkpoint has them.
    """

    def __init__(self, count: int = 0, rows: int = 0) -> None:
        self.count, self._rows = count, rows
        self._noted: set[int] = set()  # since the newest checkpoint

    def saved(self, rows: int) -> None:
        """Take note of a checkpoint that has the first ``rows`` rows."""
        self._rows = max(self._rows, rows)
        self._noted.clear()

    def lacks(self, place: int, step: int) -> bool:
        """Tell whether the row of ``step``, the ``place``-th of the file, is to be noted before it changes."""
        return place < self._rows and step not in self._noted

    def append(self, folder: str, before: Mapping[int, Sequence[str]]) -> None:
        """Note rows, by step, in the journal that lies in a local folder."""
        with open(os.path.join(folder, JOURNAL), "ab") as file:
            file.write(b"".join(json.dumps([str(step), list(row)]).encode() + b"\n" for step, row in before.items()))
        self.count += len(before)
        self._noted.update(before)


@dataclass
class Rewound:
    """What ``metrics.csv`` holds after it was taken back."""

    columns: list[str]
    steps: set[int] = field(default_factory=set)
    last: list[str] | None = None
    """The last row."""
    size: int = 0
    last_size: int = 0
    """Bytes of the last row."""


def encode(cells: Iterable[Any]) -> bytes:
    """Return a line of a CSV file."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue().encode("utf-8", "backslashreplace")


def holds_rows(path: str, state: Mapping[str, Any]) -> bool:
    """Tell whether a local or remote file begins with the rows of a state, as far as the last of them tells."""
    content = read_file(path)
    if content is None or not state["rows"]:
        return False
    rows = csv.reader(io.StringIO(content.decode("utf-8", "replace"), newline=""))
    header = next(rows, [])
    cells = next((cells for place, cells in enumerate(rows, 1) if place == state["rows"]), [""])
    return bool(header[: len(state["columns"])] == state["columns"] and cells[0] == state["last"][0])


def rewind(path: str, folder: RunFolder, state: Mapping[str, Any]) -> Rewound | None:
    """Take the file at ``path`` back to the rows of ``state``, and move the rest to ``metrics_superseded.csv``.

    Each file is replaced as a whole, the side file first. After a kill in between, the same call does what is left.

    Args:
        path: The local file, or the local copy of a remote one.
        folder: The folder of the run.
        state: The columns, the number of rows, the last of them, and the number of entries in the journal then.

    Returns:
        What the file holds now; None, and nothing is changed, if the file is missing or is not the run's.
    """
    everything = state.get("everything", False)
    count = math.inf if everything else state["rows"]
    before = {} if everything else _before(folder, state["merges"])
    cut: list[list[str]] = []
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(path, newline="", encoding="utf-8", errors="replace") as old, open(temporary, "xb") as new:
            rows = csv.reader(old)
            header = next(rows, [])
            columns = header if everything else state["columns"]
            found = Rewound(columns, size=new.write(encode(columns)))
            if not columns or header[: len(columns)] != columns:
                return None
            for place, cells in enumerate(rows):
                if place >= count:
                    cut.append(cells)
                    continue
                row = state["last"] if place == count - 1 else before.get(cells[0], cells)
                if row[0] != cells[0]:
                    return None
                row = [*row, *[""] * len(columns)][: len(columns)]
                if later := _difference(cells, row):
                    cut.append([cells[0], *later])
                _add(found, row, new)
            if not everything and count and len(found.steps) < count:  # lost, with the machine say
                _add(found, state["last"], new)
        if cut:
            _keep(folder, header, cut, str(state.get("global_step", "")))
        if cut or header != columns or found.size != os.path.getsize(path):
            os.replace(temporary, path) if found.steps else os.remove(path)
    except FileNotFoundError:
        return None
    except ValueError:  # a step that is no number
        return None
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)
    if not found.steps:
        found.size = 0
    return found


def cut_journal(folder: RunFolder, count: int | None) -> int:
    """Drop the entries of the journal after the first ``count`` (None: none), and return how many there are.

    Call it when ``metrics.csv`` is in its place.
    """
    lines = (folder.read(JOURNAL) or b"").splitlines(keepends=True)
    count = len(lines) if count is None else count
    if len(lines) > count:
        folder.write(JOURNAL, b"".join(lines[:count]))
    return count


def _add(found: Rewound, row: list[str], file: Any) -> None:
    found.steps.add(int(row[0]))
    found.last, found.last_size = row, file.write(encode(row))
    found.size += found.last_size


def _difference(cells: list[str], kept: list[str]) -> list[str]:
    """Return the cells after the first that are not the kept ones, empty where they are; nothing if all are kept."""
    later = [cell if place >= len(kept) or cell != kept[place] else "" for place, cell in enumerate(cells[1:], start=1)]
    return later if any(later) else []


def _before(folder: RunFolder, merges: int) -> dict[str, list[str]]:
    """Return what rows looked like at the ``merges``-th entry of the journal, by step: the first entry after it."""
    before: dict[str, list[str]] = {}
    for line in (folder.read(JOURNAL) or b"").splitlines()[merges:]:
        try:
            step, cells = json.loads(line)
        except ValueError:  # the process was killed while it wrote the line, and has not merged
            break
        before.setdefault(step, cells)
    return before


def _keep(folder: RunFolder, header: list[str], cut: list[list[str]], global_step: str) -> None:
    """Add rows to the side file, unless they are there already: from a resume that was killed after this."""
    content = (folder.read(SUPERSEDED) or b"").decode("utf-8", "replace")
    rows = list(csv.reader(io.StringIO(content, newline="")))
    known = rows[0][len(_ADDED) :] if rows else []
    columns = list(dict.fromkeys([*known, *header]))
    places = [columns.index(name) for name in header]
    last = rows[-1][0] if len(rows) > 1 else "0"
    written = folder.modified("metrics.csv")
    added = []
    for cells in cut:
        row = [""] * len(columns)
        for place, cell in zip(places, cells):  # a line that was not written to its end has fewer cells
            row[place] = cell
        added.append([global_step, written, *row])
    width = len(_ADDED) + len(columns)
    rows = [[*row, *[""] * (width - len(row))] for row in rows[1:]]
    if [row[1:] for row in rows if row[0] == last] == added:
        return
    number = str(int(last) + 1)
    lines = [[*_ADDED, *columns], *rows, *([number, *row] for row in added)]
    folder.write(SUPERSEDED, b"".join(map(encode, lines)))
