"""One process fails, all stop, and say why.

Each failure that leaves a launched function, or a script, is claimed on the board that the processes share; whoever
claims first owns the failure, and only that traceback is shown.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, NoReturn, TextIO, TypeVar

from treadle_fabric.errors import ProcessFailedError
from treadle_fabric.launchers.board import Board, Failure
from treadle_fabric.launchers.places import (
    chain,
    crashed_in_collective,
    describe_crash,
    describe_hang,
    lost_peer,
    place_of,
    place_of_main_thread,
    timed_out,
)

__all__ = [
    "ENDED",
    "GRACE_FAILING",
    "GRACE_STUCK",
    "LAUNCH_DIR_VARIABLE",
    "POLL_INTERVAL",
    "Member",
    "call_guarded",
    "claim_failure",
    "current_member",
    "describe_exit",
    "end_process",
    "end_run",
    "failure_of_dead",
    "first_failure",
    "join_launch",
    "leave_launch",
    "report",
    "report_death",
    "whereabouts",
]

T = TypeVar("T")

LAUNCH_DIR_VARIABLE = "TREADLE_LAUNCH_DIR"

# Seconds after a failure turned final. All of it has to fit into ten seconds, with room for a slow machine.
GRACE_STUCK = 2.0  # for a process that has not failed by itself, for example because it waits in a collective
GRACE_FAILING = 7.0  # for one that has, and is busy with its own clean-up
LOST_PEER_WAIT = 2.0  # how long a connection error waits for the failure that caused it
POLL_INTERVAL = 0.2
ENDED = "had come to its end, without an error"
TELLING_WAIT = 1.0  # how long a rank that stops waits for the one that failed to print its traceback
PLACES_WAIT = 1.0  # how long the one who reports a failed collective waits for the others to say where they are


class Member:
    """This process's part in a launch.

    Args:
        board: The launch's.
        rank: Global rank of this process.
        ranks: The global ranks that this machine's launcher started.
        launcher_is_alive: Tells whether the launching process is there; None in that process itself.
        speaks: Whether an uncaught exception is printed here. Not so where the launching process raises it.
        look: What else the thread that looks after the launch is to look for.
        interval: Seconds between two looks.
    """

    def __init__(
        self,
        board: Board,
        rank: int,
        ranks: Sequence[int],
        launcher_is_alive: Callable[[], bool] | None,
        speaks: bool = True,
        look: Callable[[Member], None] | None = None,
        interval: float = POLL_INTERVAL,
    ) -> None:
        self.board = board
        self.rank = rank
        self.ranks = tuple(ranks)
        self.pid = os.getpid()
        self.number = 0
        self.interval = interval
        self._look = look
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._placed = 0
        self.interrupted = threading.Event()
        self._launcher_is_alive = launcher_is_alive
        self._ending = threading.Lock()
        self.speaks = speaks
        self._previous_hook = sys.excepthook
        self._hook = self._excepthook  # one object, so that leave() recognizes it
        self._crash_log: TextIO | None = None
        self._spare: int | None = None

    @property
    def failed(self) -> bool:
        """Whether this process claimed a failure or was interrupted, even if the script caught it."""
        return self.number > 0 or self.interrupted.is_set()

    @property
    def launches(self) -> bool:
        """Whether this is the launching process."""
        return self._launcher_is_alive is None

    def join(self) -> None:
        """Share failures from now on."""
        self.board.post(f"joined_{self.rank}", str(self.pid))
        self._hold_descriptor()
        sys.excepthook = self._hook
        if not faulthandler.is_enabled():
            self._crash_log = self.board.crash_log(self.rank)
            if self._crash_log is not None:
                faulthandler.enable(self._crash_log)
        if self._launcher_is_alive is not None:
            self._thread = threading.Thread(target=self._watch, name="treadle-watch-launcher", daemon=True)
            self._thread.start()

    def leave(self) -> None:
        """Share them no longer."""
        if sys.excepthook is self._hook:
            sys.excepthook = self._previous_hook
        self.drop_crash_log()
        self._free_descriptor()
        self._closed.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=20)  # in a store when the interpreter ends, it would abort the process

    def drop_crash_log(self) -> None:
        """Write no note any more when a signal like SIGABRT ends this process."""
        if self._crash_log is not None:
            faulthandler.disable()
            self._crash_log.close()
            self._crash_log = None

    def _hold_descriptor(self) -> None:
        # One that a note can be written with when "Too many open files" is the failure.
        with contextlib.suppress(OSError):
            self._spare = os.open(os.devnull, os.O_RDONLY)

    def _free_descriptor(self) -> bool:
        spare, self._spare = self._spare, None
        if spare is not None:
            os.close(spare)
        return spare is not None

    def claim(self, exc: BaseException) -> bool:
        """Claim the exception as the first failure; False when another rank failed before."""
        freed = self._free_descriptor()
        try:
            return self._claim(exc)
        finally:
            if freed:
                self._hold_descriptor()

    def _claim(self, exc: BaseException) -> bool:
        if isinstance(exc, KeyboardInterrupt):
            self.interrupted.set()
            self.board.post(f"interrupted_{self.rank}")
            return True
        if isinstance(exc, GeneratorExit) or (isinstance(exc, SystemExit) and exc.code in (None, 0)):
            return True
        number = self._number_of(exc)
        failure = self.board.failure(number)
        return failure is None or failure.rank == self.rank

    def _number_of(self, exc: BaseException) -> int:
        for link in chain(exc):
            claimed = getattr(link, "_treadle_failure", None)
            if claimed is not None and claimed[0] == self.pid:
                return int(claimed[1])
        number = self.number + 1
        hangs = lost_peer(exc)
        if hangs:
            self.board.post(f"place_{number}_{self.rank}", place_of(exc))
            if not timed_out(exc):
                self._await_cause(number, exc)
        self.number = number
        exc._treadle_failure = (self.pid, number)  # type: ignore[attr-defined]
        self.board.claim(number, Failure(self.rank, _format(exc, self.rank), hangs))
        self.board.post(f"failed_{number}_{self.rank}")
        return number

    def _await_cause(self, number: int, exc: BaseException) -> None:
        # Sockets close before anybody can see that their process died.
        deadline = time.monotonic() + LOST_PEER_WAIT
        while time.monotonic() < deadline and not self.board.has(f"failure_{number}"):
            if self.board.has_launcher and self.board.has("final_interrupt"):  # which it has yet to pass on
                interrupt = KeyboardInterrupt().with_traceback(exc.__traceback__)
                self._claim(interrupt)
                raise interrupt from None
            if self._launcher_is_alive is not None and not self._launcher_is_alive():
                self._launcher_died()
            time.sleep(0.02)

    def _excepthook(self, kind: type[BaseException], exc: BaseException, tb: TracebackType | None) -> None:
        # A process forked from this one has no part in the launch. And torch may keep this hook beyond its end.
        if current_member() is not self:
            self._previous_hook(kind, exc, tb)
            return
        with _at_once():
            try:
                self._go_down(kind, exc, tb)
            except KeyboardInterrupt as interrupt:
                self._go_down(KeyboardInterrupt, interrupt.with_traceback(tb), tb)
        with self._ending:  # the thread that tells of the launcher's death has a board to take away, and ends all
            pass

    def _go_down(self, kind: type[BaseException], exc: BaseException, tb: TracebackType | None) -> None:
        self._free_descriptor()
        won = self.claim(exc)
        if isinstance(exc, KeyboardInterrupt):
            self.board.post("final_interrupt")
            if not self.board.has_launcher:
                self._tell_of_interrupt(kind, exc, tb)
            elif self.launches:
                self._previous_hook(kind, exc, tb)
            return
        number = self._number_of(exc)
        self.board.post(f"final_{number}")
        if won and self.board.claim_report(number):
            _say(f"rank {self.rank} failed:")
            self._previous_hook(kind, exc, tb)
            _say(whereabouts(self.board, number, self.ranks))
            self.board.post(f"told_{number}")
        elif not won:
            self.say_stopped(number)
        failure = self.board.failure(number)
        if failure is not None and failure.status != 1:  # it is not for this exception that the run ends
            self.end(failure.status)

    def _tell_of_interrupt(self, kind: type[BaseException], exc: BaseException, tb: TracebackType | None) -> None:
        # No launcher passes the interrupt on: it ends the others as a failure does.
        number = self.number + 1
        self.number = number
        interrupted = Failure(self.rank, f"rank {self.rank} was interrupted\n", status=128 + signal.SIGINT)
        won = self.board.claim(number, interrupted)
        self.board.post(f"failed_{number}_{self.rank}")
        self.board.post(f"final_{number}")
        failure = self.board.failure(number)
        if (won or failure is None) and self.board.claim_report(number):
            self._previous_hook(kind, exc, tb)
            self.board.post(f"told_{number}")
        elif not won:
            self.say_stopped(number)

    def finish(self, exc: BaseException) -> None:
        """Go down with an exception that the launching process reports."""
        self._free_descriptor()
        won = self.claim(exc)
        if not isinstance(exc, KeyboardInterrupt):
            number = self._number_of(exc)
            self.board.post(f"final_{number}")
            if not won:
                self.say_stopped(number)
            elif self.board.failure(number) is None:  # no note could be left, and it would be lost
                _say(f"rank {self.rank} failed:\n{_format(exc, self.rank)}")

    def end(self, status: int) -> NoReturn:
        """End this process for a failure that stands; where the board goes with it, the others see it first."""
        self.board.post(f"released_{self.rank}")
        if self.launches:
            time.sleep(GRACE_STUCK + 1)  # the others see it, and end before they would miss this process
            self.board.remove()
        elif self.board.goes_with_process:
            self.await_release(GRACE_STUCK + 1)
        end_process(status)

    def await_release(self, seconds: float) -> None:
        """Wait until the others need the board no longer, but no longer than this."""
        start = time.monotonic()
        waiting = [rank for rank in self.ranks if rank != self.rank]
        while waiting := [rank for rank in waiting if not self.board.has(f"released_{rank}")]:
            waited = time.monotonic() - start
            if waited > GRACE_STUCK:  # one that has not come by now does not
                waiting = [rank for rank in waiting if self.board.has(f"joined_{rank}")]
            if waited > seconds:
                return
            time.sleep(0.05)

    def say_stopped(self, number: int) -> None:
        """Say once in a line that this rank stopped because another failed; what failed comes first."""
        failure = self.board.failure(number)
        if failure is not None and self.board.post(f"stopped_{number}_{self.rank}") and self.speaks:
            deadline = time.monotonic() + TELLING_WAIT
            while not self.board.has(f"told_{number}") and time.monotonic() < deadline:
                time.sleep(0.02)
            report(self.board, number, self.ranks)  # it may be busy with its clean-up
            what = "was interrupted" if failure.status == 128 + signal.SIGINT else "failed"
            _say(f"rank {self.rank} stopped because rank {failure.rank} {what}")

    def note_place(self) -> None:
        """Where a collective failed on another rank, say where this one is; for a thread that looks out for it."""
        number = self.board.latest()
        if number == self._placed or (failure := self.board.failure(number)) is None:
            return
        self._placed = number
        if failure.hangs:
            self.board.post(f"place_{number}_{self.rank}", place_of_main_thread())

    def _watch(self) -> None:
        assert self._launcher_is_alive is not None
        final_since: float | None = None
        while not self._closed.is_set():
            if not self._launcher_is_alive():
                self._launcher_died()
            if self._look is not None:
                self._look(self)
            self.note_place()
            number = self.board.latest()
            failure = self.board.failure(number) if number and self.board.is_final(number, self.ranks) else None
            if failure is None or failure.rank == self.rank:
                final_since = None
            elif final_since is None:
                final_since = time.monotonic()
            else:
                grace = GRACE_FAILING if self.board.has(f"failed_{number}_{self.rank}") else GRACE_STUCK
                if time.monotonic() - final_since > grace:
                    self.say_stopped(number)
                    self.end(failure.status)
            self._closed.wait(self.interval)

    def _launcher_died(self) -> None:
        with self._ending:  # main and watching thread may both come here
            number, launcher = self.board.latest() + 1, self.ranks[0]
            self.board.post(f"place_{number}_{self.rank}", place_of_main_thread())
            if self.board.post("launcher_died"):
                who = f"rank {launcher}, the launching process," if self.speaks else "the launching process"
                sentence = f"{who} died without a traceback; rank {self.rank} and the others stop\n"
                failure = failure_of_dead(self.board, launcher, sentence) if self.speaks else Failure(-1, sentence)
                self.board.claim(number, failure)
                report(self.board, number, self.ranks)
                time.sleep(3 * POLL_INTERVAL)  # the others look at the board before it goes
                self.board.remove()
            end_process(1)


_member: Member | None = None


def current_member() -> Member | None:
    """This process's part in a launch, None outside of one (and in processes forked from one that has)."""
    return _member if _member is not None and _member.pid == os.getpid() else None


def _forget_crash_log() -> None:
    # A forked worker's abort would stand in the note of its rank.
    if _member is not None:
        _member.drop_crash_log()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_crash_log)


def join_launch(member: Member) -> Member:
    """Take part in a launch: from now on failures are shared."""
    global _member
    leave_launch()
    _member = member
    member.join()
    return member


def leave_launch() -> None:
    """Be an ordinary process again, after the launch has ended."""
    global _member
    if _member is not None:
        _member.leave()
    _member = None


def claim_failure(exc: BaseException) -> bool:
    """Tell the other processes of the launch that this one failed. Call it before any clean-up.

    Returns:
        Whether this is the failure to show: True for the first process to claim, and in a run without a launch
        directory. False in a process that fails because, or after, another one did.
    """
    member = current_member()
    return True if member is None else member.claim(exc)


def first_failure() -> Failure | None:
    """The newest failure of this launch, None while there is none."""
    member = current_member()
    return None if member is None else member.board.failure(member.board.latest())


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


def describe_exit(rank: int, status: int, joined: bool) -> str:
    """A sentence for a process that died without a traceback; ``status`` as in ``Popen.returncode``."""
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = "signal"
        hint = " (the kernel does that when memory runs out)" if name == "SIGKILL" else ""
        return f"rank {rank} was killed by {name} ({-status}){hint}"
    if joined:
        return f"rank {rank} ended with exit status {status} and left no traceback"
    return f"rank {rank} ended with exit status {status} before it reached the launch, where the others wait for it"


def failure_of_dead(board: Board, rank: int, sentence: str) -> Failure:
    """The failure of a process that died: what it left behind where a signal like SIGABRT ended it, and a sentence."""
    dump = board.read(f"crash_{rank}")
    return Failure(rank, describe_crash(dump) + sentence, hangs=crashed_in_collective(dump))


def report(board: Board, number: int, ranks: Sequence[int]) -> None:
    """Print a failure, unless somebody did."""
    failure = board.failure(number)
    if failure is not None and board.claim_report(number):
        _say(str(failure) + whereabouts(board, number, ranks))
        board.post(f"told_{number}")


def report_death(member: Member, rank: int) -> None:
    """Claim the failure of another rank that died without a word."""
    board, number = member.board, member.board.latest() + 1
    if number > 1 and board.is_final(number - 1, member.ranks):
        return  # that is why
    board.claim(number, failure_of_dead(board, rank, f"rank {rank} died and left no traceback\n"))
    board.post(f"final_{number}")
    report(board, number, member.ranks)


def whereabouts(board: Board, number: int, ranks: Sequence[int]) -> str:
    """Where each rank was when a collective failed; empty for other failures."""
    failure = board.failure(number)
    if failure is None or not failure.hangs:
        return ""
    deadline = time.monotonic() + PLACES_WAIT
    while time.monotonic() < deadline and not all(
        board.has(f"place_{number}_{rank}") or board.has(f"ended_{rank}") or board.read(f"crash_{rank}")
        for rank in ranks
    ):
        time.sleep(0.05)
    return describe_hang(board, number, failure, ranks)


def end_run(reason: str, status: int) -> NoReturn:
    """End this process and the others of its launch now, from any thread.

    Args:
        reason: What is said about it, a sentence; once, whichever ranks end.
        status: The exit status of all of them.
    """
    member = current_member()
    if member is None:
        _say(reason)
    else:
        board, number = member.board, member.board.latest()
        said = board.failure(number)
        first = said is None or said.status != status
        number += first
        board.post(f"place_{number}_{member.rank}", place_of_main_thread())
        if first:
            board.claim(number, Failure(member.rank, f"rank {member.rank}: {reason}\n", hangs=True, status=status))
            board.post(f"final_{number}")
            if member.speaks:
                report(board, number, member.ranks)
        board.post(f"failed_{number}_{member.rank}")
        member.end(status)
    end_process(status)


def end_process(status: int) -> NoReturn:
    """End this process now, from any thread, and take its worker processes along."""
    for child in multiprocessing.active_children():
        with contextlib.suppress(Exception):
            child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


def _format(exc: BaseException, rank: int) -> str:
    if isinstance(exc, SystemExit):
        return f"rank {rank} called sys.exit({exc.code!r})\n"
    return "".join(traceback.format_exception(exc))


@contextlib.contextmanager
def _at_once() -> Iterator[None]:
    # Torch's hook, around this one, collects what is written, to put the rank before each line. It would come after
    # what other ranks say of it, or not at all where another thread ends the process.
    before = sys.stderr
    if isinstance(before, io.StringIO) and sys.__stderr__ is not None:
        sys.stderr = sys.__stderr__
    try:
        yield
    finally:
        sys.stderr = before


def _say(text: str) -> None:
    # One write, so that lines of several processes do not mix.
    if not text:
        return
    with contextlib.suppress(Exception):
        sys.stderr.write(text if text.endswith("\n") else text + "\n")
        sys.stderr.flush()
