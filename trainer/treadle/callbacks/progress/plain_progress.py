"""Progress as plain lines, for log files and for installations without tqdm and rich."""

from __future__ import annotations

import builtins
from typing import Any

from treadle.callbacks.progress.display import Bar, Display, Stage, format_metric, format_rate, format_time
from treadle.callbacks.progress.progress_bar import TimedProgressBar

__all__ = ["LinesDisplay", "PlainProgressBar"]


class LinesDisplay(Display):
    """One line at the end of every epoch and evaluation loader, and in between one every 2 to 60 seconds.

    The lines grow sparser as the run grows older, so that a first look comes soon and a week fits into a log file.
    """

    records = True

    def __init__(self) -> None:
        self._metrics: dict[str, Any] = {}

    def interval(self, elapsed: float) -> float:
        """A tenth of the time so far, within 2 and 60 seconds."""
        return min(60.0, max(2.0, elapsed / 10))

    def draw(self, bar: Bar, metrics: dict[str, Any] | None) -> None:
        """Print the line."""
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
        """A printed line stays."""

    def print(self, *args: Any, **kwargs: Any) -> None:
        """The built-in ``print``."""
        builtins.print(*args, **kwargs)

    def shutdown(self) -> None:
        """Nothing was taken."""


class PlainProgressBar(TimedProgressBar):
    """Progress in plain lines: at the end of every epoch and, in long ones, every 2 to 60 seconds. Needs no package.

    Args:
        refresh_rate: not more often than every that many batches; 0 turns it off.
    """

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate, leave=False)

    def _make_display(self) -> Display:
        return LinesDisplay()
