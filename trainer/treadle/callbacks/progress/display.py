"""What progress bars are made of: the count of one pass over a loader, the place that shows it, and its numbers."""

from __future__ import annotations

import math
import os
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Literal, TypeAlias

__all__ = [
    "Bar",
    "Display",
    "Stage",
    "format_metric",
    "format_rate",
    "format_time",
    "is_notebook",
    "is_terminal",
]

Stage: TypeAlias = Literal["sanity", "train", "validation", "test", "predict"]

_MEMORY = 10.0  # seconds over which the displayed speed is averaged


def is_notebook() -> bool:
    """Tell whether this process is a Jupyter kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config


def is_terminal(stream: Any) -> bool:
    """Tell whether a line that was written to ``stream`` can be written over."""
    if "PYCHARM_HOSTED" in os.environ and stream in (sys.__stdout__, sys.__stderr__):
        return True  # the console of PyCharm is no tty, but understands a carriage return
    return bool(getattr(stream, "isatty", lambda: False)()) and os.environ.get("TERM") != "dumb"


@dataclass(slots=True, eq=False)
class Bar:
    """The count of one epoch, or of one pass over an evaluation loader."""

    stage: Stage
    description: str
    total: int | None
    """The number of batches; None when unknown."""
    initial: int = 0
    """The number of batches that were done before this process began."""
    temporary: bool = False
    """Whether the bar disappears when it is done."""
    n: int = 0
    """The number of batches done."""
    started: float = field(default_factory=monotonic)
    drawn_n: int = -1
    """The count that is on display; -1 for none."""
    drawn_at: float = -math.inf
    rate: float | None = None
    """Recent batches a second, without the time spent in nested stages."""
    _measured_n: int = 0
    _measured_at: float = 0.0
    _window: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        self.n = self._measured_n = self.initial
        self._measured_at = self.started

    @property
    def elapsed(self) -> float:
        """The seconds since the bar began."""
        return monotonic() - self.started

    @property
    def known_total(self) -> int | None:
        """The total, or None if the count went past it."""
        return None if self.total is None or self.n > self.total else self.total

    @property
    def remaining(self) -> float | None:
        """The seconds that are left; None when unknown."""
        total = self.known_total
        return None if total is None or not self.rate else (total - self.n) / self.rate

    def measure(self, now: float) -> None:
        """Bring :attr:`rate` up to date."""
        count, seconds = self.n - self._measured_n, now - self._measured_at
        if count <= 0 or seconds <= 0:
            return
        decay = math.exp(-seconds / _MEMORY)
        self._window = (self._window[0] * decay + count, self._window[1] * decay + seconds)
        self.rate = self._window[0] / self._window[1]
        self._measured_n, self._measured_at = self.n, now

    def skip(self, batches: int) -> None:
        """Leave a number of batches out of :attr:`rate`: how long they took is not known."""
        self._measured_n += batches

    def pause(self, seconds: float) -> None:
        """Leave a number of seconds out of :attr:`rate`: something else ran."""
        self._measured_at += seconds


class Display(ABC):
    """Where bars appear: lines of a log file, a terminal, a notebook."""

    records: bool
    """Whether what is drawn stays. Then a bar is drawn once more when it is done, and never before its first batch."""

    @abstractmethod
    def interval(self, elapsed: float) -> float:
        """Return the seconds between two redraws, ``elapsed`` seconds after the run began."""

    @abstractmethod
    def draw(self, bar: Bar, metrics: dict[str, Any] | None) -> None:
        """Show ``bar`` as it is now; with ``metrics`` None, the metrics on display stay."""

    @abstractmethod
    def close(self, stage: Stage, keep: bool) -> None:
        """End the bar of a stage: leave what is drawn (``keep``), or take it away."""

    @abstractmethod
    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bars."""

    @abstractmethod
    def shutdown(self) -> None:
        """Leave the terminal as it was before the run."""


def format_metric(value: Any) -> str:
    """Return three significant digits; numbers of one size have the same length, so that the line does not move."""
    if hasattr(value, "item") and getattr(value, "size", None) is not None:
        try:
            value = value.item()
        except (RuntimeError, ValueError):  # more than one element
            return str(value)
    return f"{value:#.3g}".removesuffix(".") if isinstance(value, float) else str(value)


def format_time(seconds: float) -> str:
    """Return ``MM:SS``, or ``H:MM:SS`` from an hour on."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m:02d}:{s:02d}"


def format_rate(rate: float | None) -> str:
    """Return batches a second, or seconds a batch when batches are slow."""
    if not rate:
        return "?it/s"
    if rate < 1:
        return f"{1 / rate:.2f}s/it"
    return f"{rate:.0f}it/s" if rate >= 100 else f"{rate:.2f}it/s"
