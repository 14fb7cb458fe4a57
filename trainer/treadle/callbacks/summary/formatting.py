"""The table of layers as text: counts, sizes, columns and totals."""

from __future__ import annotations

import shutil
from itertools import zip_longest
from typing import NamedTuple

from treadle.callbacks.summary.fitting import Column, fit_columns, width_of
from treadle_fabric import MisconfigurationException

__all__ = ["Totals", "format_summary", "get_formatted_model_size", "get_human_readable_count", "not_counted"]

_BETWEEN = " | "
_UNITS = (" ", "K", "M", "B", "T")


class Totals(NamedTuple):
    """The numbers of the whole model, which are printed below the table."""

    total_parameters: int
    trainable_parameters: int
    model_size: float
    """In megabytes (10^6 bytes)."""
    total_training_modes: dict[str, int]
    """The number of modules in ``"train"`` and in ``"eval"`` mode."""
    total_flops: int
    """Of one forward pass of the example input; 0 without one."""

    def rows(self) -> list[tuple[str, str]]:
        """Return a label and a text for each number; FLOPs only if they were counted."""
        rows = [
            ("Trainable params", get_human_readable_count(self.trainable_parameters)),
            ("Non-trainable params", get_human_readable_count(self.total_parameters - self.trainable_parameters)),
            ("Total params", get_human_readable_count(self.total_parameters)),
            ("Total estimated model params size (MB)", get_formatted_model_size(self.model_size)),
            ("Modules in train mode", str(self.total_training_modes["train"])),
            ("Modules in eval mode", str(self.total_training_modes["eval"])),
        ]
        return [*rows, ("Total FLOPs", get_human_readable_count(self.total_flops))] if self.total_flops else rows


def format_summary(columns: list[Column], totals: Totals, width: int | None = None) -> str:
    """Return the table of layers, and the totals below it, as text.

    Args:
        columns: the table.
        totals: the numbers below it.
        width: how many characters a line has. Default: those of the terminal (or ``COLUMNS``), and 80 without one.
    """
    lines = []
    if columns and columns[0][1]:
        width = shutil.get_terminal_size((80, 24)).columns if width is None else width
        columns = fit_columns(columns, width, between=len(_BETWEEN))
        widths = [width_of(column) for column in columns]
        rows = [[heading for heading, _ in columns], *zip(*(cells for _, cells in columns), strict=True)]
        table = [
            _BETWEEN.join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
            for row in rows
            for line in zip_longest(*(cell.split("\n") for cell in row), fillvalue="")
        ]
        rule = "-" * max(map(len, table))
        lines += [table[0], rule, *table[1:], rule]
    return "\n".join([*lines, *(f"{value:<9} {label}" for label, value in totals.rows())])


def not_counted(uninitialized: int) -> str:
    """Return the line about a number of parameters that have no shape yet."""
    return f"{uninitialized:<9} Uninitialized parameters, not counted: their shape comes from the first batch"


def get_formatted_model_size(total_model_size: float) -> str:
    """Return a number of megabytes with three decimals."""
    return f"{total_model_size:,.3f}"


def get_human_readable_count(number: int) -> str:
    """Return a count in thousands (K), millions (M), billions (B) or trillions (T).

    Example::

        >>> [get_human_readable_count(n) for n in (123, 1234, 2_000_000, 5 * 10**15)]
        ['123  ', '1.2 K', '2.0 M', '5,000 T']

    Raises:
        MisconfigurationException: ``number`` is negative.
    """
    if number < 0:
        raise MisconfigurationException(f"get_human_readable_count({number}): a count is 0 or more.")
    power = min((len(str(int(number))) - 1) // 3, len(_UNITS) - 1)
    value = number / 1000**power
    text = f"{int(value):,d}" if power == 0 or value >= 100 else f"{value:,.1f}"
    return f"{text} {_UNITS[power]}"
