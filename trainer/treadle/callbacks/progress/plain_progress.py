"""A progress bar made of plain lines, for log files and for installations without tqdm and rich."""

from __future__ import annotations

import builtins
from typing import Any

from treadle.callbacks.progress.display import Bar, Display, Stage, format_metric, format_rate, format_time
from treadle.callbacks.progress.progress_bar import TimedProgressBar

__all__ = ["LinesDisplay", "PlainProgressBar"]


class LinesDisplay(Display):
    """Lines: one at the end of every epoch and evaluation loader, and in between one every 2 to 60 seconds.

    The longer the run, the fewer the lines: the first one comes soon, and the lines of a week fit into a log file.
    """

    records = True

    def __init__(self) -> None:
        self._metrics: dict[str, Any] = {}

    def interval(self, elapsed: float) -> float:
        """Return a tenth of the time so far, but 2 seconds at least and 60 at most."""
        return min(60.0, max(2.0, elapsed / 10))

    def draw(self, bar: Bar, metrics: dict[str, Any] | None) -> None:
        """Print a line."""
        if metrics is not None:
            self._metrics = metrics
        total = bar.known_total
        share = f"{100 * bar.n // total:3d}% " if total else ""
        times = format_time(bar.elapsed)
        if bar.remaining is not None:
            times += f"<{format_time(bar.remaining)}"
        facts = [times, format_rate(bar.rate)]
        if bar.stage == "train":
            facts += [f"{name}={format_metric(value)}" for name, value in self._metrics.items()]
        count = f"{bar.n}/{'?' if total is None else total}"
        builtins.print(f"{bar.description}: {share}{count} [{', '.join(facts)}]", flush=True)

    def close(self, stage: Stage, keep: bool) -> None:
        """Do nothing: a printed line stays."""

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print with the built-in ``print``."""
        builtins.print(*args, **kwargs)

    def shutdown(self) -> None:
        """Do nothing: the terminal is as it was."""


class PlainProgressBar(TimedProgressBar):
    """Print a line at the end of every epoch and, in long epochs, every 2 to 60 seconds. No package is needed.

    Args:
        refresh_rate: print at most once in that many batches; 0 prints nothing.
    """

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate, leave=False)

    def _make_display(self) -> Display:
        return LinesDisplay()
