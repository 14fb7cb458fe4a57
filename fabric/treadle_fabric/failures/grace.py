"""How long a process may go on once all must stop: the one rule, as a table.

Everything together fits into the ten seconds within which a failed run ends, with room for a slow machine.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Final

__all__ = ["Step", "Stopwatch", "due"]

# Seconds that one process waits for what another one is about to do.
LOOK_INTERVAL: Final = 0.2  # between two looks at the board
CAUSE_WAIT: Final = 2.0  # a connection error, for the failure that caused it
REPORT_WAIT: Final = 1.0  # a rank that stops, for the rank that failed to print its traceback
PLACES_WAIT: Final = 1.0  # the report of a failed collective, for the others to say where they are
BOARD_STAYS: Final = 3.0  # a process with which the board goes, for the others to see a final failure
JOIN_WAIT: Final = 2.0  # the same process, for a rank that has not joined yet; it will not
RELEASE_WAIT: Final = 30.0  # a process with which the board goes, without a failure


class Step(IntEnum):
    """What is done about a process, from the mildest to the strongest."""

    WAIT = 0
    """Nothing."""
    INTERRUPT = 1
    """Its launcher sends SIGINT, if it has not been interrupted."""
    END = 2
    """It ends itself, and says why."""
    TERMINATE = 3
    """Its launcher sends SIGTERM."""
    KILL = 4
    """Its launcher sends SIGKILL."""


SIGNALS: Final = {Step.INTERRUPT: signal.SIGINT, Step.TERMINATE: signal.SIGTERM, Step.KILL: signal.SIGKILL}

# The rule: seconds after the failure became final, or after the interrupt.
STUCK: Final = {Step.END: 2.0, Step.TERMINATE: 2.6, Step.KILL: 3.8}
"""For a process that has not failed by itself, for example because it waits in a collective."""
FAILING: Final = {Step.END: 7.0, Step.TERMINATE: 7.6, Step.KILL: 8.8}
"""For a process that has failed by itself, and cleans up."""
STUCK_LAUNCHER: Final = {Step.END: 3.0}
"""For the launching process, which outlives those that it started."""
FAILING_LAUNCHER: Final = {Step.END: 8.5}
INTERRUPTED: Final = {Step.INTERRUPT: 0.5, Step.TERMINATE: 4.0, Step.KILL: 7.0}
"""For a process of a launch that is interrupted with Ctrl-C."""


def due(rule: Mapping[Step, float], seconds: float) -> Step:
    """The strongest step that a rule has for a process after so many seconds."""
    return max((step for step, after in rule.items() if seconds > after), default=Step.WAIT)


class Stopwatch:
    """Measures for how long something has held without a break.

    Args:
        now: The clock, in seconds.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._start: float | None = None

    def seconds(self, holds: bool) -> float:
        """Seconds since the first call of an unbroken row with True; 0 where it does not hold."""
        if not holds:
            self._start = None
        elif self._start is None:
            self._start = self._now()
        return 0.0 if self._start is None else self._now() - self._start
