"""Signals that end a run at the next batch instead of in the middle of one."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from treadle_fabric import TreadleError

__all__ = ["SIGTERMException", "Signals"]


class SIGTERMException(SystemExit, TreadleError):
    """The process was asked to terminate; its exit status is 143 (128 + SIGTERM)."""


class Signals:
    """Notes SIGTERM while it is entered, in the main thread; elsewhere it does nothing."""

    def __init__(self) -> None:
        self.received: int = 0
        """The signal's number, 0 while none came."""
        self._before: Any = None
        self._installed = False

    def __enter__(self) -> Signals:
        self.received = 0
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
            self._installed = True
        return self

    def __exit__(self, *exc: object) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, self._before if self._before is not None else signal.SIG_DFL)
            self._installed = False
        if self.received and exc[0] is None:  # it came after the last batch
            self.raise_received()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def raise_received(self) -> None:
        """End the run: called between two batches."""
        raise SIGTERMException(128 + (self.received or signal.SIGTERM))  # another rank may have got it
