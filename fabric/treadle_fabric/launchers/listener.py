"""Hears of a signal while the main thread, which runs Python's handlers, waits in a collective."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable

__all__ = ["SignalListener"]


class SignalListener:
    """Calls a function, in a thread of its own, with the number of each signal that has a Python handler.

    A listener hears nothing where another thread than the main thread made it, or where an event loop listens already.

    Args:
        heard: The function; it must be quick.
    """

    _writing: int | None = None  # one pipe and one thread for all listeners, made once
    _listeners: tuple[SignalListener, ...] = ()
    _changing = threading.RLock()  # a signal handler may make or close a listener, too

    def __init__(self, heard: Callable[[int], None]) -> None:
        self._heard = heard
        if threading.current_thread() is threading.main_thread():
            _start()
        with SignalListener._changing:
            SignalListener._listeners += (self,)

    def close(self) -> None:
        """Listen no longer."""
        with SignalListener._changing:
            SignalListener._listeners = tuple(other for other in self._listeners if other is not self)


def _start() -> None:
    if SignalListener._writing is None:
        reading, SignalListener._writing = os.pipe()
        os.set_blocking(SignalListener._writing, False)
        threading.Thread(target=_listen, args=(reading,), name="treadle-signals", daemon=True).start()
    before = signal.set_wakeup_fd(SignalListener._writing, warn_on_full_buffer=False)
    if before not in (-1, SignalListener._writing):  # an event loop listens
        signal.set_wakeup_fd(before)


def _listen(reading: int) -> None:
    while True:
        for number in os.read(reading, 64):
            for listener in SignalListener._listeners:
                listener._heard(number)


_masks = threading.local()


def _hold_signals() -> None:
    # A signal that comes to a forked process before it has forgotten the pipe would count as the parent's.
    if SignalListener._writing is not None:
        _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())


def _let_signals_come() -> None:
    before = vars(_masks).pop("before", None)
    if before is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _forget() -> None:
    # A forked process writes to the same pipe: its signals would count as the parent's.
    if SignalListener._writing is not None:
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)
    SignalListener._writing, SignalListener._listeners = None, ()
    SignalListener._changing = threading.RLock()  # the parent's may be held by a thread that is not here
    _let_signals_come()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_hold_signals, after_in_parent=_let_signals_come, after_in_child=_forget)
