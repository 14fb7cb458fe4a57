"""The part that this process has in a launch, and what users and launchers call about it."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import sys
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from treadle_fabric.errors import ProcessFailedError
from treadle_fabric.failures.member import Member
from treadle_fabric.failures.notes import Failure, Joined
from treadle_fabric.failures.places import lost_peer
from treadle_fabric.failures.process import end_process, say

__all__ = [
    "call_at_looks",
    "call_guarded",
    "claim_failure",
    "current_member",
    "end_run",
    "first_failure",
    "join_launch",
    "leave_launch",
]

T = TypeVar("T")
Owner = TypeVar("Owner")


class _Membership:
    """What a member changes in its process: the hook for uncaught exceptions, the crash log, the thread that looks."""

    def __init__(self, member: Member, check: Callable[[], None] | None) -> None:
        self.member = member
        self._closed = threading.Event()
        self._hook = self._excepthook  # one object, so that close() recognizes it
        self._previous_hook, sys.excepthook = sys.excepthook, self._hook
        self._crash_log = None if faulthandler.is_enabled() else member.board.crash_log(member.rank)
        if self._crash_log is not None:
            faulthandler.enable(self._crash_log)
        self._thread = threading.Thread(target=self._watch, args=(check,), daemon=True)
        self._thread.name = "treadle-watch-launcher"
        if check is not None:
            self._thread.start()

    def close(self) -> None:
        if sys.excepthook is self._hook:
            sys.excepthook = self._previous_hook
        self.drop_crash_log()
        self.member.spare.free()
        self._closed.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=20)  # in a store when the interpreter ends, it would abort the process

    def drop_crash_log(self) -> None:
        if self._crash_log is not None:
            faulthandler.disable()
            self._crash_log.close()
            self._crash_log = None

    def _watch(self, check: Callable[[], None]) -> None:
        while not self._closed.is_set():
            check()
            self.member.look()
            self._closed.wait(self.member.board.look_interval)

    def _excepthook(self, kind: type[BaseException], exc: BaseException, tb: TracebackType | None) -> None:
        # A process forked from this one has no part in the launch. And torch may keep this hook beyond its end.
        if current_member() is not self.member:
            self._previous_hook(kind, exc, tb)
            return

        def show() -> None:
            if not isinstance(exc, KeyboardInterrupt):
                say(f"rank {self.member.rank} failed:")
            self._previous_hook(kind, exc, tb)

        # Torch's hook, around this one, collects what is written, to put the rank before each line. It would come after
        # what other ranks say of it, or not at all where another thread ends the process.
        collected = isinstance(sys.stderr, io.StringIO) and sys.__stderr__ is not None
        with contextlib.redirect_stderr(sys.__stderr__ if collected else sys.stderr):
            try:
                self.member.go_down(exc, show)
            except KeyboardInterrupt as interrupt:
                self._excepthook(KeyboardInterrupt, interrupt.with_traceback(tb), tb)
        with self.member.ending:
            pass


_membership: _Membership | None = None


def current_member() -> Member | None:
    """This process's part in a launch, None outside of one and in processes forked from a member."""
    member = None if _membership is None else _membership.member
    return member if member is not None and member.pid == os.getpid() else None


def call_at_looks(owner: Owner, function: Callable[[Owner], object]) -> bool:
    """Have a function called at each look at the failure board, by the thread that looks.

    Args:
        owner: What the function is called with, as long as it lives.
        function: It must not take long.

    Returns:
        Whether there is such a thread; outside of a launch there is none.
    """
    member, reference = current_member(), weakref.ref(owner)
    if member is None:
        return False

    def answer() -> bool:
        alive = reference()
        if alive is not None:
            function(alive)
        return alive is not None

    member.answers.append(answer)
    return True


def join_launch(member: Member, check: Callable[[], None] | None = None) -> Member:
    """Take part in a launch: from now on failures are shared.

    Args:
        member: This process's part.
        check: Called at each look at the board, in a thread of its own; None where this process's launcher looks.
    """
    global _membership
    leave_launch()
    member.board.post(Joined(member.rank))
    member.spare.hold()
    _membership = _Membership(member, check)
    return member


def leave_launch() -> None:
    """Be an ordinary process again, after the launch has ended."""
    global _membership
    if _membership is not None:
        _membership.close()
    _membership = None


def _forget_crash_log() -> None:
    # The abort of a forked worker would be taken for its rank's.
    if _membership is not None:
        _membership.drop_crash_log()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_forget_crash_log)


def claim_failure(exc: BaseException) -> bool:
    """Tell the other processes of the launch that this one failed. Call it before any clean-up.

    Returns:
        Whether this is the failure to show: True for the first process to claim, and in a run without a launch.
        False in a process that fails because, or after, another one did.
    """
    member = current_member()
    return True if member is None else member.claim(exc)


def first_failure() -> Failure | None:
    """The newest failure of this launch, None while there is none."""
    member = current_member()
    return None if member is None else member.board.newest_failure()


def call_guarded(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call the function, and claim the exception that leaves it.

    Raises:
        ProcessFailedError: in place of a connection error that another process caused by failing.
    """
    try:
        return function(*args, **kwargs)
    except BaseException as exc:
        failure = None if claim_failure(exc) else first_failure()
        if failure is None or not lost_peer(exc):
            raise
        raise ProcessFailedError(f"rank {failure.rank} failed first: {failure.summary}") from exc


def end_run(reason: str, status: int) -> NoReturn:
    """End this process and the others of its launch now, from any thread.

    Args:
        reason: What is said about it, a sentence; once, whichever ranks end.
        status: The exit status of all of them.
    """
    member = current_member()
    if member is not None:
        member.end_run(reason, status)
    say(reason)
    end_process(status)
