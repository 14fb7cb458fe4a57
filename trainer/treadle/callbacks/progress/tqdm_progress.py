"""The default progress bar, drawn by tqdm; in a log file plain lines, in a notebook a widget."""

from __future__ import annotations

import builtins
import os
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, TextIO, cast

from treadle.callbacks.progress.display import (
    Bar,
    Display,
    Stage,
    format_metric,
    is_notebook,
    is_terminal,
)
from treadle.callbacks.progress.plain_progress import LinesDisplay
from treadle.callbacks.progress.progress_bar import TimedProgressBar
from treadle_fabric import require_package

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["TQDMProgressBar"]


_SHORTEST_BAR = 3


def _fit(metrics: str, room: int) -> str:
    """Return as much of the metrics as fits into the room, without cutting a number."""
    if len(metrics) + 2 <= room:
        return metrics
    kept = metrics[: max(0, room - 3)].rpartition(", ")[0]
    return f"{kept}, …" if kept else "…"


@cache
def _tqdm_class() -> type[tqdm[Any]]:
    from tqdm.auto import tqdm  # an extra

    class Tqdm(tqdm):  # type: ignore[type-arg]
        """A tqdm bar whose speed (batches a second) is set from outside, and that cuts no number in two.

        The speed is 0 when unknown; with None tqdm measures it.
        """

        monitor_interval = 0  # the hooks redraw, so no thread has to watch
        speed: float | None = None

        @property
        def format_dict(self) -> dict[str, Any]:
            entries = dict(super().format_dict)
            if self.speed is not None:
                entries["rate"] = self.speed
            if not entries["ncols"]:
                return entries
            entries["ncols"] = max(
                1, entries["ncols"] - len("^C")
            )  # room for a "^C", which would otherwise break the line
            if entries["postfix"]:
                bare = self.format_meter(**{**entries, "postfix": None, "ncols": None})  # its bar has 10 characters
                entries["postfix"] = _fit(entries["postfix"], entries["ncols"] - len(bare) + 10 - _SHORTEST_BAR)
            return entries

    return Tqdm


def __getattr__(name: str) -> Any:
    if name == "Tqdm":  # for users who build their own bars in init_*_tqdm
        return _tqdm_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _AboveBars:
    """Replaces ``sys.stdout`` or ``sys.stderr`` while there are bars, so that whole lines are printed above them."""

    def __init__(self, stream: Any) -> None:
        self._wrapped = stream  # tqdm compares streams by this name
        self._pid = os.getpid()
        self._pending = ""

    def write(self, text: str) -> int:
        if _called_by_tqdm() or os.getpid() != self._pid:  # tqdm itself, or a forked worker
            self._wrapped.write(text)
            return len(text)
        lines, newline, self._pending = (self._pending + text).rpartition("\n")
        if newline:
            with _tqdm_class().external_write_mode(file=cast("TextIO", self)):
                self._wrapped.write(lines + newline)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self._pending and not _called_by_tqdm():
            self._wrapped.write(self._pending)
            self._pending = ""
        self._wrapped.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


def _called_by_tqdm() -> bool:
    name: str = sys._getframe(2).f_globals.get("__name__", "")
    return name.partition(".")[0] == "tqdm"


class _TqdmDisplay(Display):
    records = False

    def __init__(self, owner: TQDMProgressBar) -> None:
        self._owner = owner
        self.stream = sys.stdout
        self._redirection = ExitStack()
        self._tqdms: dict[Stage, tqdm[Any]] = {}
        self._drawn: dict[Stage, Bar] = {}

    def interval(self, elapsed: float) -> float:
        return 0.1

    def get(self, stage: Stage) -> tqdm[Any]:
        """Return the tqdm bar of a stage, and make it if there is none yet."""
        found = self._tqdms.get(stage)
        if found is None:
            if not self._tqdms and not is_notebook():
                self._redirect()
            found = getattr(self._owner, f"init_{stage}_tqdm")()
            self._tqdms[stage] = self._owner._lines[stage] = found
        return found

    def put(self, stage: Stage, line: tqdm[Any]) -> None:
        """Show a bar of the user's for a stage."""
        self._tqdms[stage] = line

    def _redirect(self) -> None:
        for stream, redirect in ((sys.stdout, redirect_stdout), (sys.stderr, redirect_stderr)):
            if is_terminal(stream):
                above = _AboveBars(stream)
                self._redirection.callback(above.flush)
                self._redirection.enter_context(redirect(cast("TextIO", above)))

    def shows(self, stage: Stage) -> bool:
        return stage in self._tqdms

    def draw(self, bar: Bar, metrics: dict[str, Any] | None) -> None:
        line = self.get(bar.stage)
        if self._drawn.get(bar.stage) is not bar:
            self._drawn[bar.stage] = bar
            line.initial = bar.initial
            line.desc = bar.description  # no colon: tqdm adds it, twice where the total is unknown
            line.reset(bar.total)
            line.total = bar.total
            line.start_t = time.time() - bar.elapsed
        line.n = bar.n
        line.speed = bar.rate or 0.0  # type: ignore[attr-defined]
        if metrics is not None:
            line.set_postfix({name: format_metric(value) for name, value in metrics.items()}, refresh=False)
        line.refresh()

    def close(self, stage: Stage, keep: bool) -> None:
        line = self._tqdms.pop(stage, None)
        self._drawn.pop(stage, None)
        if line is not None:
            line.leave = keep
            line.clear()  # tqdm puts a finished line at the top of its lines, and would leave this one behind
            line.close()
        if not self._tqdms:
            self._redirection.close()

    def print(self, *args: Any, **kwargs: Any) -> None:
        builtins.print(*args, **kwargs)

    def shutdown(self) -> None:
        for stage in reversed(list(self._tqdms)):
            self.close(stage, keep=stage not in ("sanity", "validation"))
        self._redirection.close()


class TQDMProgressBar(TimedProgressBar):
    """One line per stage, drawn by tqdm at most 10 times a second.

    The line of validation is below the line of training; sanity check, test and prediction have a line of their own. In
    a file or a pipe there are plain lines instead, in a notebook tqdm's widget. Override the ``init_*_tqdm`` methods to
    build other bars, and :meth:`get_metrics` to show other numbers.

    Args:
        refresh_rate: redraw at most once in that many batches (but once a second when batches are slow); 0 turns the
            bar off.
        process_position: the number of bars, each with its validation bar, to leave room for above: for several runs
            in one terminal.
        leave: keep the finished bar of every training epoch. Otherwise one line serves all epochs.

    Raises:
        MissingPackageError: tqdm is not installed.
        MisconfigurationException: ``refresh_rate`` is no integer or negative.
    """

    BAR_FORMAT: ClassVar[str] = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
    """The parts of a bar, as tqdm's ``bar_format``; a subclass may set others. Without that, tqdm chooses them."""

    def __init__(self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False) -> None:
        require_package("tqdm", "TQDMProgressBar", "trainer", "PlainProgressBar needs no package.")
        super().__init__(refresh_rate, leave)
        self._process_position = process_position
        self._lines: dict[Stage, tqdm[Any]] = {}  # the last bar of each stage; it stays after the run

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_lines": {}}

    @property
    def process_position(self) -> int:
        """The number of bars that room is left for above."""
        return self._process_position

    def _make_display(self) -> Display:
        return _TqdmDisplay(self) if is_notebook() or is_terminal(sys.stdout) else LinesDisplay()

    def _line(self, stage: Stage) -> tqdm[Any]:
        if isinstance(self._display, _TqdmDisplay):
            line = self._display.get(stage)
        elif (found := self._lines.get(stage)) is not None:
            line = found
        else:  # in a log file: it accepts every call, and draws nothing
            line = self._lines[stage] = getattr(self, f"init_{stage}_tqdm")()
        if (bar := self._last.get(stage)) is not None:
            line.n, line.total = bar.n, bar.total
        return line

    def _set_line(self, stage: Stage, line: tqdm[Any]) -> None:
        self._lines[stage] = line
        if isinstance(self._display, _TqdmDisplay):
            self._display.put(stage, line)

    @property
    def train_progress_bar(self) -> tqdm[Any]:
        """The tqdm bar of training."""
        return self._line("train")

    @train_progress_bar.setter
    def train_progress_bar(self, bar: tqdm[Any]) -> None:
        self._set_line("train", bar)

    @property
    def val_progress_bar(self) -> tqdm[Any]:
        """The tqdm bar of validation, or of the sanity check while that runs."""
        return self._line(self._val_stage)

    @val_progress_bar.setter
    def val_progress_bar(self, bar: tqdm[Any]) -> None:
        self._set_line(self._val_stage, bar)

    @property
    def test_progress_bar(self) -> tqdm[Any]:
        """The tqdm bar of testing."""
        return self._line("test")

    @test_progress_bar.setter
    def test_progress_bar(self, bar: tqdm[Any]) -> None:
        self._set_line("test", bar)

    @property
    def predict_progress_bar(self) -> tqdm[Any]:
        """The tqdm bar of prediction."""
        return self._line("predict")

    @predict_progress_bar.setter
    def predict_progress_bar(self, bar: tqdm[Any]) -> None:
        self._set_line("predict", bar)

    @property
    def _val_stage(self) -> Stage:
        return "sanity" if self._trainer is not None and self._trainer.sanity_checking else "validation"

    def init_sanity_tqdm(self) -> tqdm[Any]:
        """Build the bar of the sanity check."""
        return self._new_tqdm(self.sanity_check_description)

    def init_train_tqdm(self) -> tqdm[Any]:
        """Build the bar of training."""
        return self._new_tqdm(self.train_description)

    def init_validation_tqdm(self) -> tqdm[Any]:
        """Build the bar of validation, below the bar of training where there is one."""
        nested = isinstance(self._display, _TqdmDisplay) and self._display.shows("train")
        return self._new_tqdm(self.validation_description, below=int(nested))

    def init_test_tqdm(self) -> tqdm[Any]:
        """Build the bar of testing."""
        return self._new_tqdm(self.test_description)

    def init_predict_tqdm(self) -> tqdm[Any]:
        """Build the bar of prediction."""
        return self._new_tqdm(self.predict_description)

    def _new_tqdm(self, description: str, below: int = 0) -> tqdm[Any]:
        display = self._display if isinstance(self._display, _TqdmDisplay) else None
        line = _tqdm_class()(
            desc=description,
            position=2 * self._process_position + below,
            disable=self.is_disabled or display is None,
            dynamic_ncols=True,
            file=sys.stdout if display is None else display.stream,
            bar_format=None if self.BAR_FORMAT is TQDMProgressBar.BAR_FORMAT else self.BAR_FORMAT,
            delay=1e-9,  # so that tqdm draws nothing before the count is set
        )
        line.desc = description  # a disabled bar has none
        return line
