"""Print the results of an evaluation as a table, for a person to read."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence

__all__ = ["print_results", "results_table"]


def results_table(results: Sequence[Mapping[str, float]], stage: str, width: int = 80) -> str:
    """Format results as a table with one row for each metric and one column for each dataloader.

    Args:
        results: for every dataloader its names and values; the suffix ``/dataloader_idx_N`` is left out of the names.
        stage: "validate" or "test", for the heading.
        width: the width of the terminal, in characters; columns that do not fit go below. Default: 80.
    """
    columns = [
        {name.removesuffix(f"/dataloader_idx_{i}"): value for name, value in found.items()}
        for i, found in enumerate(results)
    ]
    names = list(dict.fromkeys(name for column in columns for name in column))
    if not names:
        return ""
    heads = [f"{stage} metric", *(f"dataloader {i}" if len(columns) > 1 else "value" for i in range(len(columns)))]
    first = max(len(heads[0]), *(len(n) for n in names))
    cells = [[f"{c[n]:.6g}" if n in c else "" for n in names] for c in columns]
    widths = [max(len(h), *(len(v) for v in column)) for h, column in zip(heads[1:], cells, strict=True)]
    fits = max(1, (width - first) // (max(widths) + 2))
    blocks = []
    for start in range(0, len(columns), fits):
        part = slice(start, start + fits)
        rule = "─" * (first + sum(w + 2 for w in widths[part]))
        lines = [rule, heads[0].ljust(first) + _row(heads[1:][part], widths[part]), rule]
        for i, name in enumerate(names):
            lines.append(name.ljust(first) + _row([c[i] for c in cells[part]], widths[part]))
        blocks.append("\n".join([*lines, rule]))
    return "\n".join(blocks)


def _row(values: Sequence[str], widths: Sequence[int]) -> str:
    return "".join("  " + v.rjust(w) for v, w in zip(values, widths, strict=True))


def print_results(results: Sequence[Mapping[str, float]], stage: str) -> None:
    """Print the table, if there is anything in it."""
    table = results_table(results, stage, shutil.get_terminal_size().columns)
    if table:
        print(table)
