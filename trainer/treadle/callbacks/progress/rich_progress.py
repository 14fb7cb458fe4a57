"""A progress bar drawn by rich; in a log file plain lines."""

from __future__ import annotations

import builtins
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from treadle.callbacks.progress.display import Bar, Display, Stage, format_rate, format_time
from treadle.callbacks.progress.plain_progress import LinesDisplay
from treadle.callbacks.progress.progress_bar import TimedProgressBar
from treadle_fabric import require_package

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn, Task, TaskID
    from rich.style import Style

    from treadle.contracts import Trainer

__all__ = ["RichProgressBar", "RichProgressBarTheme"]


@dataclass
class RichProgressBarTheme:
    """Colours and formats of :class:`RichProgressBar`; a style is what rich takes as one, e.g. ``"bold green"``.

    Args:
        description: style of the label.
        progress_bar: style of the bar while it grows.
        progress_bar_finished: style of the full bar.
        progress_bar_pulse: style of the bar when the number of batches is unknown.
        batch_progress: style of the batch counter.
        time: style of the elapsed and remaining time.
        processing_speed: style of the batches per second.
        metrics: style of the metrics.
        metrics_text_delimiter: the text between two metrics.
        metrics_format: format specification of a number.
    """

    description: str | Style = ""
    progress_bar: str | Style = "#6206E0"
    progress_bar_finished: str | Style = "#6206E0"
    progress_bar_pulse: str | Style = "#6206E0"
    batch_progress: str | Style = ""
    time: str | Style = "dim"
    processing_speed: str | Style = "dim underline"
    metrics: str | Style = "italic"
    metrics_text_delimiter: str = " "
    metrics_format: str = ".3f"


_DEFAULT_THEME = RichProgressBarTheme()


class _RichDisplay(Display):
    records = False

    def __init__(self, owner: RichProgressBar, console: Console) -> None:
        self._owner = owner
        self._console = console
        self.progress: Progress | None = None
        self._tasks: dict[Stage, TaskID] = {}
        self._drawn: dict[Stage, Bar] = {}

    def interval(self, elapsed: float) -> float:
        return 0.1

    def task(self, stage: Stage) -> Task | None:
        """Return rich's task of a stage; None if the stage is not on display."""
        if self.progress is None or stage not in self._tasks:
            return None
        return next(task for task in self.progress.tasks if task.id == self._tasks[stage])

    def draw(self, bar: Bar, metrics: dict[str, Any] | None) -> None:
        if self.progress is None:
            self.progress = self._owner._new_progress(self._console)
            self.progress.start()
        progress, stage = self.progress, bar.stage
        fields = _texts(bar)
        if stage not in self._tasks:
            self._tasks[stage] = progress.add_task(bar.description, metrics="", **fields)
        if self._drawn.get(stage) is not bar:
            self._drawn[stage] = bar
            progress.reset(self._tasks[stage], description=bar.description, total=bar.total)
        if metrics is not None:
            fields["metrics"] = self._owner._metrics_text(metrics)
        progress.update(self._tasks[stage], completed=bar.n, total=bar.known_total, **fields)
        progress.refresh()

    def close(self, stage: Stage, keep: bool) -> None:
        self._drawn.pop(stage, None)
        task = self._tasks.pop(stage, None)
        if self.progress is None or task is None:
            return
        if not keep:
            self.progress.remove_task(task)
            self.progress.refresh()
        if not self._tasks:
            self.shutdown()

    def print(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("file") is not None:
            builtins.print(*args, **kwargs)
            return
        given = {k: v for k, v in kwargs.items() if k in ("sep", "end") and v is not None}
        self._console.print(*map(str, args), markup=False, highlight=False, soft_wrap=True, **given)

    def shutdown(self) -> None:
        progress, self.progress = self.progress, None
        self._tasks.clear()
        self._drawn.clear()
        if progress is not None:
            progress.stop()


def _texts(bar: Bar) -> dict[str, Any]:
    total, remaining = bar.known_total, bar.remaining
    return {
        "batches": f"{bar.n}/{'--' if total is None else total}",
        "time": f"{format_time(bar.elapsed)} • {'--:--' if remaining is None else format_time(remaining)}",
        "speed": format_rate(bar.rate),
    }


class RichProgressBar(TimedProgressBar):
    """A bar drawn by rich, at most 10 times a second; in a file or a pipe plain lines.

    Args:
        refresh_rate: redraw at most once in that many batches (but once a second when batches are slow); 0 turns the
            bar off.
        leave: keep the finished bar of every training epoch. Otherwise one line serves all epochs.
        theme: colours and formats.
        console_kwargs: arguments of the :class:`rich.console.Console` to draw on.

    Raises:
        MissingPackageError: rich is not installed.
        MisconfigurationException: ``refresh_rate`` is no integer or negative.
    """

    def __init__(
        self,
        refresh_rate: int = 100,
        leave: bool = False,
        theme: RichProgressBarTheme = _DEFAULT_THEME,
        console_kwargs: dict[str, Any] | None = None,
    ) -> None:
        require_package("rich", "RichProgressBar", "trainer", "PlainProgressBar needs no package.")
        super().__init__(refresh_rate, leave)
        self.theme = theme
        self._console_kwargs = console_kwargs or {}

    def _make_display(self) -> Display:
        from rich.console import Console  # an extra

        console = Console(**self._console_kwargs)
        live = console.is_jupyter or (console.is_terminal and not console.is_dumb_terminal)
        return _RichDisplay(self, console) if live else LinesDisplay()

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        """Return the columns of the bar, from left to right; override this method to add or drop some.

        Each task has rich's own fields and the texts ``batches``, ``time``, ``speed`` and ``metrics``.
        """
        # an extra
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.table import Column  # an extra

        theme, width = self.theme, Console(**self._console_kwargs).width
        return [
            TextColumn("{task.description}", style=theme.description),
            BarColumn(
                bar_width=min(40, max(8, width // 2 - 30)),
                complete_style=theme.progress_bar,
                finished_style=theme.progress_bar_finished,
                pulse_style=theme.progress_bar_pulse,
                table_column=Column(no_wrap=True),
            ),
            TextColumn("{task.fields[batches]}", style=theme.batch_progress, markup=False),
            TextColumn("{task.fields[time]}", style=theme.time, markup=False),
            TextColumn("{task.fields[speed]}", style=theme.processing_speed, markup=False),
            TextColumn(
                "{task.fields[metrics]}", style=theme.metrics, markup=False, table_column=Column(overflow="fold")
            ),
        ]

    def _new_progress(self, console: Console) -> Progress:
        from rich.progress import Progress  # an extra

        # the hooks refresh the display, so that no drawing thread competes with the training loop
        return Progress(*self.configure_columns(self.trainer), console=console, auto_refresh=False)

    def _metrics_text(self, metrics: dict[str, Any]) -> str:
        return self.theme.metrics_text_delimiter.join(f"{name}={self._number(v)}" for name, v in metrics.items())

    def _number(self, value: Any) -> str:
        value = value.item() if getattr(value, "ndim", None) == 0 else value
        return format(value, self.theme.metrics_format) if isinstance(value, float) else str(value)

    def refresh(self, hard: bool = False) -> None:
        """Draw rich's tasks now, for example after a change of one. Every redraw is complete, ``hard`` or not."""
        if self.progress is not None:
            self.progress.refresh()

    @property
    def progress(self) -> Progress | None:
        """Rich's display; None while there is none."""
        return self._display.progress if isinstance(self._display, _RichDisplay) else None

    def _task(self, stage: Stage) -> Task | None:
        return self._display.task(stage) if isinstance(self._display, _RichDisplay) else None

    @property
    def train_progress_bar(self) -> Task | None:
        """Rich's task of training; None while it is not on display."""
        return self._task("train")

    @property
    def val_sanity_check_bar(self) -> Task | None:
        """Rich's task of the sanity check; None while it is not on display."""
        return self._task("sanity")

    @property
    def val_progress_bar(self) -> Task | None:
        """Rich's task of validation; None while it is not on display."""
        return self._task("validation")

    @property
    def test_progress_bar(self) -> Task | None:
        """Rich's task of testing; None while it is not on display."""
        return self._task("test")
