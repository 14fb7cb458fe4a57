"""RichModelSummary: the table of layers, drawn by rich."""

from __future__ import annotations

from typing import Any

from treadle.callbacks.model_summary import ModelSummary
from treadle.callbacks.summary.fitting import fit_columns
from treadle.callbacks.summary.formatting import Totals
from treadle_fabric import require_package

__all__ = ["RichModelSummary"]


class RichModelSummary(ModelSummary):
    """The table of :class:`ModelSummary`, drawn by rich.

    Args:
        max_depth: how many levels of layers to show: 1 for the top level, -1 for all; 0 prints nothing.
        **summarize_kwargs: ``header_style`` (default "bold magenta"), and what :class:`rich.table.Table` takes.

    Raises:
        MissingPackageError: rich is not installed.
    """

    def __init__(self, max_depth: int = 1, **summarize_kwargs: Any) -> None:
        require_package("rich", "RichModelSummary", "trainer", "ModelSummary needs no package.")
        super().__init__(max_depth, **summarize_kwargs)

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int,
        **summarize_kwargs: Any,
    ) -> None:
        """Print the table; override this method to print another one."""
        # rich is optional, and takes long to import
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text  # optional, too

        console = Console()
        table = Table(**{"header_style": "bold magenta", **summarize_kwargs})
        columns = fit_columns(summary_data, console.width, between=3, around=4)  # the lines of rich's tables
        for heading, _ in columns:
            numeric = heading in ("Params", "Params per Device", "FLOPs", "In sizes", "Out sizes")
            table.add_column(heading, justify="right" if numeric else "left", style="dim" if heading == " " else None)
        for row in zip(*(cells for _, cells in columns), strict=True):
            table.add_row(*(Text(cell.rstrip()) for cell in row))
        console.print(table)
        below = Table.grid(padding=(0, 1))
        totals = Totals(total_parameters, trainable_parameters, model_size, total_training_modes, total_flops)
        for label, value in totals.rows():
            below.add_row(f"[bold]{label}[/]:", value)
        console.print(below)
