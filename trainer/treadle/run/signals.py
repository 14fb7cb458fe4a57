"""Signals that end a run at the next batch instead of in the middle of one."""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Concatenate, Final, ParamSpec, Protocol, TypeGuard, TypeVar

from treadle_fabric import (
    MisconfigurationException,
    SignalListener,
    Strategy,
    TreadleError,
    all_gather_objects,
    claim_failure,
    end_run,
)

__all__ = ["ANNOUNCED", "TERMINATED", "SIGTERMException", "Signals", "claim_together", "during_a_save", "meet"]

P = ParamSpec("P")
T = TypeVar("T")

GRACE_VARIABLE: Final = "TREADLE_SIGTERM_GRACE"
GRACE_S: Final = 20.0  # SLURM and Kubernetes kill after 30 by default, and the other ranks need some seconds, too
_AFTER_A_SAVE_S: Final = 2.0  # to come to the end of the batch
_TERMINATED: Final = 128 + signal.SIGTERM
TERMINATED: Final = "signal"
ANNOUNCED: Final = "announced"


class SIGTERMException(SystemExit, TreadleError):
    """The process was asked to terminate; its exit status is 143 (128 + SIGTERM).

    Where a handler of the user's raised SystemExit on another rank, it has the exit status of that one.
    """

    together = False
    """Whether all ranks end between the same two batches."""
    announced = False
    """Whether the signal was the one with which the cluster announces the end of the job."""
    job = ""
    """The cluster's name of the job that is to be queued again, because the run has saved for that; else empty."""


class Signals:
    """Notes signals while this context is entered, in the main thread; in another thread it does nothing.

    What happens when::

        the signal comes:   it is noted; the run goes on to the end of the batch
        the batch ends:     all ranks agree to stop, and save (``Trainer._fit``)
        this context ends:  the handlers that were there before are called, each once, if its signal came
                            what a handler raises ends the run; otherwise SIGTERMException does
                            the handlers are put back

    Python's own handlers (SIG_DFL, SIG_IGN, ``default_int_handler``) are not called. Where another error ends the run
    meanwhile, that one stands, with a note of what a handler raised. A handler that replaces this one while the context
    is entered is called by Python, at once, and stays; the run saves and ends all the same, after this batch or one of
    the next, for a thread has to hear of the signal.

    The main thread runs no handler while it waits in a collective. If the batch does not end within
    ``TREADLE_SIGTERM_GRACE`` seconds (default: 20), and the main thread is not saving, another thread ends the process,
    and no handler is called. Neither the save nor the handlers have a limit.

    Args:
        also: The number of another signal that ends the run likewise, but without this limit. Default: 0, none.
        pass_on: For a process that waits for the ranks: sends a signal to all of them. Default: this process is one.
    """

    def __init__(self, also: int = 0, pass_on: Callable[[int], None] | None = None) -> None:
        self.received: int = 0
        """The number of the first signal that came; 0 while none came."""
        self.saving = 0
        """How many saves are under way, one inside the other."""
        self.end: SIGTERMException | None = None
        """What ended the run because of a signal, whatever a handler has raised since."""
        self._also, self._pass_on = also, pass_on
        self._taken: list[_Taken] = []
        self._listener: SignalListener | None = None
        self._heeded: threading.Event | None = None
        self._grace = GRACE_S

    def __getstate__(self) -> dict[str, Any]:
        return vars(Signals(self._also))  # handlers, and the signals that came, are those of this process

    def passed_on_by(self, send: Callable[[int], None]) -> Signals:
        """The same signals, in a process that waits for ranks which it has started; ``send`` sends to all of them."""
        return Signals(self._also, send)

    def __enter__(self) -> Signals:
        self.received, self.saving, self.end = 0, 0, None
        self._heeded = threading.Event()
        if threading.current_thread() is threading.main_thread():
            self._grace = _grace()
            numbers = dict.fromkeys(number for number in (int(signal.SIGTERM), self._also) if number)
            self._taken = [_Taken(number, self._note, shared=self._pass_on is not None) for number in numbers]
            self._listener = SignalListener(self._hear)
            self.received = next((taken.number for taken in self._taken if taken.came), 0)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._heed()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        try:
            if self.received and error is None:  # the signal came after the last batch
                self._end_late()
            elif self.received and _is_failure(error) and self._pass_on is None:
                self._end_failed(error)
            elif self.received:
                self._call_handlers()
        finally:
            for taken in self._taken:
                taken.put_back()
            self._taken = []

    def _note(self, number: int) -> None:
        self.received = self.received or number
        if self._pass_on is not None:
            self._pass_on(number)

    @property
    def wish(self) -> str:
        """What this rank wants all to end for: ``ANNOUNCED``, ``TERMINATED``, or nothing: empty."""
        if not self.received:
            return ""
        return ANNOUNCED if self.received == self._also else TERMINATED

    @property
    def answered(self) -> bool:
        """Whether the program has a handler of its own for the first signal that came."""
        return any(taken.handler_of_user() is not None for taken in self._taken if taken.number == self.received)

    def raise_received(self, *, together: bool = False, announced: bool = False) -> None:
        """Raise what ends the run.

        Args:
            together: Whether all ranks end between the same two batches. Default: False.
            announced: Whether, on any of the ranks, the signal was ``also``. Default: False.
        """
        self._heed()
        self.end = SIGTERMException(_TERMINATED)
        self.end.together, self.end.announced = together, announced
        raise self.end

    def _end_late(self) -> None:
        try:
            self.raise_received()
        except SIGTERMException:
            self._call_handlers()
            raise

    def _end_failed(self, error: Exception) -> None:
        """Call the handlers although an error ends the run; the other ranks learn of the error first."""
        claim_failure(error)
        try:
            self._call_handlers()
        except BaseException as second:
            error.add_note(f"Then the handler of a signal that had come raised {second!r}.")

    def _call_handlers(self) -> None:
        for taken in sorted(self._taken, key=lambda taken: taken.number != self.received):
            taken.call_handler()

    def _heed(self) -> None:
        if self._heeded is not None:
            self._heeded.set()

    def _hear(self, number: int) -> None:
        if any(taken.number == number and not taken.is_there() for taken in self._taken):
            self.received = self.received or number  # the handler is one that replaced this one, and Python calls it
        if number == signal.SIGTERM and self._heeded is not None and not self._heeded.is_set() and not self._pass_on:
            threading.Thread(target=self._limit, args=(self._heeded,), name="treadle-sigterm", daemon=True).start()

    def _limit(self, heeded: threading.Event) -> None:
        wait = self._grace
        while not heeded.wait(wait):
            if not self.saving:
                end_run(
                    f"SIGTERM came, and the batch did not end within {self._grace:g} s ({GRACE_VARIABLE}): the run "
                    "ends without another save; the last checkpoint is intact.",
                    status=_TERMINATED,
                )
            while self.saving:
                time.sleep(0.1)
            wait = _AFTER_A_SAVE_S


class _Taken:
    """The handler of one signal during a run, and the one that was there before.

    It may be called outside of the run, too: in a process that was forked during the run, or after it by a handler of
    the user's that calls the one that it has replaced. Then it does what would be done without it.

    Args:
        number: The signal.
        note: Called with ``number`` when the signal comes in this process.
        shared: Whether this process passes the signal on to ranks. Forked ranks then do not call the handler of the
            user's that they inherited: this process does.
    """

    def __init__(self, number: int, note: Callable[[int], None], *, shared: bool) -> None:
        self.number, self._note = number, note
        self.came = False
        self._frame: FrameType | None = None
        self._pid, self._active = os.getpid(), True
        self._passed_on = mmap.mmap(-1, 1) if shared else None  # forked processes see what is written here
        self._before = before = signal.getsignal(number)
        if isinstance(before, _Taken) and before._is_passed_on():
            self.came = before.came  # before this rank was so far
        signal.signal(number, self)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._is_passed_on():
            self.came = True
        elif not self._is_of_this_run():
            self._do_as_before(frame)
        else:
            if not self.came:
                self.came, self._frame = True, frame
            if self._passed_on is not None:
                self._passed_on[0] = 1
            self._note(number)

    def is_there(self) -> bool:
        """Whether this is the signal's handler now."""
        return signal.getsignal(self.number) is self

    def put_back(self) -> None:
        """Put the handler back that was there before, unless another one has replaced this one."""
        if self.is_there():
            signal.signal(self.number, self._before if self._before is not None else signal.SIG_DFL)
        self._active = False

    def call_handler(self) -> None:
        """Call the user's handler that was there before, if the signal came."""
        frame, self._frame = self._frame, None  # which holds what the batch held
        if self.came and (handler := self._handler()) is not None:
            handler(self.number, frame)

    def handler_of_user(self) -> Any:
        """The user's handler that was there before, whichever process calls it; None for Python's own."""
        before = self._before
        while isinstance(before, _Taken):
            before = before._before
        return before if callable(before) and before is not signal.default_int_handler else None

    def _handler(self) -> Any:
        before = self._before
        while isinstance(before, _Taken) and not before._is_of_this_run():
            if before._is_passed_on():
                return None
            before = before._before
        return before if callable(before) and before is not signal.default_int_handler else None

    def _is_of_this_run(self) -> bool:
        return self._active and self._pid == os.getpid()

    def _is_passed_on(self) -> bool:
        """Whether the process that waits for this rank has passed the signal on."""
        return self._passed_on is not None and self._pid != os.getpid() and bool(self._passed_on[0])

    def _do_as_before(self, frame: FrameType | None) -> None:
        if callable(self._before):
            self._before(self.number, frame)
        elif self._before is not signal.SIG_IGN:
            signal.signal(self.number, signal.SIG_DFL)
            signal.raise_signal(self.number)


def _is_failure(error: BaseException | None) -> TypeGuard[Exception]:
    return isinstance(error, Exception) and not isinstance(error, SystemExit)  # SIGTERMException is both


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

    A rank that did not claim the end would be taken for stuck, and be killed in the middle of its clean-up. Where a
    handler of the user's raised SystemExit on one rank, the ranks that called none end with its status; where a handler
    raised an error, its rank claims first, so that its traceback is shown.
    """
    _share_status(error, strategy)  # waits for ranks that have not come here yet, and would be taken for stuck, too
    if _is_failure(error):
        claim_failure(error)
    meet(strategy)
    if strategy.is_global_zero and isinstance(error, SystemExit):
        claim_failure(error)
    meet(strategy)
    if not isinstance(error, KeyboardInterrupt):  # which ends no process
        claim_failure(error)


def _share_status(error: BaseException, strategy: Strategy) -> None:
    none = -1
    status = none
    if isinstance(error, SystemExit) and not isinstance(error, SIGTERMException):
        code: object = error.code
        status = 0 if code is None else code & 0xFF if isinstance(code, int) else 1
    with contextlib.suppress(RuntimeError):
        status = max(all_gather_objects(strategy, status))  # on the hosts: the devices may never come to an end
        if isinstance(error, SIGTERMException) and status != none:
            error.code = status
            error.args = (status,)


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
