"""How long each action took, and how often it ran."""

from __future__ import annotations

import time
from array import array
from typing import Any, Final

from treadle.profilers.profiler import Profiler
from treadle.profilers.report import readable, table
from treadle_fabric import PathLike, check_flag

__all__ = ["SimpleProfiler"]


class SimpleProfiler(Profiler):
    """Reports the mean and the total duration of each action, the number of its calls, and its share of the stage.

    Times are those of the host: an operation on a GPU counts where the host waits for it.

    Args:
        dirpath: See :class:`Profiler`.
        filename: See :class:`Profiler`.
        extended: Also report the calls and the share. Default: True.

    Attributes:
        recorded_durations: The durations of each action in seconds, as arrays of the type "d".
        current_actions: When each action began that has not ended, by ``time.perf_counter``.
        start_time: When the stage began.
    """

    def __init__(self, dirpath: PathLike | None = None, filename: str | None = None, extended: bool = True) -> None:
        super().__init__(dirpath, filename)
        check_flag("SimpleProfiler: extended", extended)
        self.extended = extended
        self.current_actions: dict[str, float] = {}
        self.recorded_durations: dict[str, array[float]] = {}
        self.start_time = time.perf_counter()
        self._end_time: float | None = None

    def begin(self) -> None:
        """Forget what an earlier stage recorded; what was recorded before the first stage stays."""
        if self._end_time is not None:
            self.recorded_durations, self.start_time, self._end_time = {}, time.perf_counter(), None
        self.current_actions = {}

    def finish(self) -> None:
        """Keep the time of the end."""
        self._end_time = time.perf_counter()

    def start(self, action_name: str) -> None:
        """Begin to measure an action.

        Raises:
            ValueError: The action has begun already, and has not ended.
        """
        if action_name in self.current_actions:
            raise ValueError(
                f"The action {action_name!r} was started again before it was stopped: give actions inside of each other"
                " different names."
            )
        self.current_actions[action_name] = time.perf_counter()

    def stop(self, action_name: str) -> None:
        """End to measure an action.

        Raises:
            ValueError: The action has not begun.
        """
        now = time.perf_counter()
        began = self.current_actions.pop(action_name, None)
        if began is None:
            raise ValueError(f"The action {action_name!r} was stopped, and has not been started.")
        durations = self.recorded_durations.get(action_name)
        if durations is None:
            durations = self.recorded_durations[action_name] = array("d")
        durations.append(now - began)

    def summary(self) -> str:
        """Return the table of the actions, the longest first."""
        whole = (self._end_time or time.perf_counter()) - self.start_time
        totals = {name: sum(durations) for name, durations in self.recorded_durations.items()}
        names = ["Action", "Mean (s)", "Calls", "Total (s)", "%"]
        rows = [_row("Total", "", "", whole, whole)]
        for name, total in sorted(totals.items(), key=lambda item: item[1], reverse=True):
            calls = len(self.recorded_durations[name])
            rows.append(_row(readable(name), _seconds(total / calls), str(calls), total, whole))
        if not self.extended:
            names, *rows = ([name, mean, total] for name, mean, _, total, _ in [names, *rows])
        return "\n".join([self.title, *table(names, rows), *_NOTE[: self.extended]])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "current_actions": {}}  # what runs in this process does not run in a copy


_NOTE: Final = ["Actions lie inside of others, so that shares add up to more than 100 %."]


def _row(name: str, mean: str, calls: str, total: float, whole: float) -> list[str]:
    return [name, mean, calls, _seconds(total), f"{100 * total / whole:.2f}" if whole else ""]


def _seconds(duration: float) -> str:
    return f"{duration:.6f}" if duration < 1000 else f"{duration:.1f}"
