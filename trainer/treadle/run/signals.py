"""Signals that end a run at the next batch instead of in the middle of one."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Concatenate, Final, ParamSpec, Protocol, TypeVar

from treadle_fabric import MisconfigurationException, SignalListener, Strategy, TreadleError, claim_failure, end_run

__all__ = ["SIGTERMException", "Signals", "claim_together", "during_a_save", "meet"]

P = ParamSpec("P")
T = TypeVar("T")

GRACE_VARIABLE: Final = "TREADLE_SIGTERM_GRACE"
GRACE_S: Final = 20.0  # SLURM and Kubernetes kill after 30 by default, and the other ranks need some seconds, too
_AFTER_A_SAVE_S: Final = 2.0  # to come to the end of the batch


class SIGTERMException(SystemExit, TreadleError):
    """The process was asked to terminate; its exit status is 143 (128 + SIGTERM)."""

    together = False
    """Whether all ranks end between the same two batches."""


class Signals:
    """Notes SIGTERM while this context is entered, in the main thread; in another thread it does nothing.

    The main thread runs no handler while it waits in a collective. If the batch does not end within
    ``TREADLE_SIGTERM_GRACE`` seconds (default: 20), and the main thread is not saving, another thread ends the process.

    Args:
        also: The number of another signal that ends the run likewise, but without this limit. Default: 0, none.
    """

    def __init__(self, also: int = 0) -> None:
        self.received: int = 0
        """The number of the signal that came; 0 while none came."""
        self.saving = 0
        """How many saves are under way, one inside the other."""
        self._also = also
        self._before: dict[int, Any] = {}
        self._listener: SignalListener | None = None
        self._heeded: threading.Event | None = None
        self._grace = GRACE_S

    def __getstate__(self) -> dict[str, Any]:
        return vars(Signals(self._also))  # handlers, and the signals that came, are those of this process

    def __enter__(self) -> Signals:
        self.received, self.saving = 0, 0
        self._heeded = threading.Event()
        if threading.current_thread() is threading.main_thread():
            self._grace = _grace()
            self._before = {signal.SIGTERM: signal.signal(signal.SIGTERM, self._note)}
            if self._also and signal.getsignal(self._also) is signal.SIG_DFL:  # keep a user's handler
                self._before[self._also] = signal.signal(self._also, self._note)
            self._listener = SignalListener(self._hear)
        return self

    def __exit__(self, *exc: object) -> None:
        self._heed()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for number, before in self._before.items():
            signal.signal(number, before if before is not None else signal.SIG_DFL)
        self._before = {}
        if self.received and exc[0] is None:  # the signal came after the last batch
            self.raise_received()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def raise_received(self, *, together: bool = False) -> None:
        """Raise what ends the run; ``together``: all ranks end between the same two batches."""
        self._heed()
        raised = SIGTERMException(128 + signal.SIGTERM)
        raised.together = together
        raise raised

    def _heed(self) -> None:
        if self._heeded is not None:
            self._heeded.set()

    def _hear(self, number: int) -> None:
        if number == signal.SIGTERM and self._heeded is not None and not self._heeded.is_set():
            threading.Thread(target=self._limit, args=(self._heeded,), name="treadle-sigterm", daemon=True).start()

    def _limit(self, heeded: threading.Event) -> None:
        wait = self._grace
        while not heeded.wait(wait):
            if not self.saving:
                end_run(
                    f"SIGTERM came, and the batch did not end within {self._grace:g} s ({GRACE_VARIABLE}): the run "
                    "ends without another save; the last checkpoint is intact.",
                    status=128 + signal.SIGTERM,
                )
            while self.saving:
                time.sleep(0.1)
            wait = _AFTER_A_SAVE_S


def _grace() -> float:
    value = os.environ.get(GRACE_VARIABLE, "")
    try:
        seconds = float(value) if value else GRACE_S
        if seconds >= 0:
            return seconds
    except ValueError:
        pass
    raise MisconfigurationException(
        f"{GRACE_VARIABLE}={value!r}: this is the number of seconds, 0 or more, that a batch may still take after "
        f"SIGTERM. Leave it out for {GRACE_S:g}."
    )


def claim_together(error: BaseException, strategy: Strategy) -> None:
    """Claim an end that all ranks come to; rank 0 claims it first, because its exit status is the run's.

    A rank that did not claim the end would be taken for stuck, and be killed in the middle of its clean-up.
    """
    meet(strategy)  # a rank that has not come here yet would be taken for stuck, too
    if strategy.is_global_zero:
        claim_failure(error)
    meet(strategy)
    claim_failure(error)


def meet(strategy: Strategy) -> None:
    """Wait for the other ranks, unless one of them has ended."""
    with contextlib.suppress(RuntimeError):
        strategy.barrier()


class _HasSignals(Protocol):
    _signals: Signals


S = TypeVar("S", bound=_HasSignals)


def during_a_save(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """Decorate a method that saves: the time limit after SIGTERM waits for its end."""

    def saving(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        self._signals.saving += 1
        try:
            return method(self, *args, **kwargs)
        finally:
            self._signals.saving -= 1

    return functools.update_wrapper(saving, method)
