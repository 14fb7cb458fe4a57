"""A process's part in a launch: what it does when it fails, and when another rank does."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import NoReturn

from treadle_fabric.failures import grace, notes
from treadle_fabric.failures.board import Board
from treadle_fabric.failures.notes import Failure
from treadle_fabric.failures.places import chain, lost_peer, place_of, place_of_main_thread, timed_out
from treadle_fabric.failures.process import THIS_PROCESS, Process, SpareDescriptor
from treadle_fabric.failures.report import claim_death, format_exception, report

__all__ = ["Member"]

_INTERRUPT_STATUS = 128 + signal.SIGINT


class Member:
    """One rank of a launch.

    Args:
        board: The board of the launch.
        rank: Global rank of this process.
        launches: Whether this is the launching process.
        speaks: Whether an uncaught exception is printed here. Not so where the launching process raises it.
        process: The process; tests give one that does not end.
        ends_itself: Whether this process ends when another rank has failed. Not so where what started the processes
            ends them: the failure is noted, so that errors that follow from it can name it.
    """

    def __init__(
        self,
        board: Board,
        rank: int,
        launches: bool = False,
        speaks: bool = True,
        process: Process = THIS_PROCESS,
        ends_itself: bool = True,
    ) -> None:
        self.board = board
        self.rank = rank
        self.launches = launches
        self.speaks = speaks
        self.process = process
        self.ends_itself = ends_itself
        self.pid = os.getpid()
        self.interrupted = threading.Event()
        self.ending = threading.Lock()
        """Held while this process tells of the launching process's death, takes the board away and ends."""
        self.spare = SpareDescriptor()
        self.answers: list[Callable[[], bool]] = []
        """What answers other ranks at each look at the board; one that returns False is asked no more."""
        self._own = Failure(0, rank, "")  # the newest that this process has claimed; 0: none
        self._placed = 0
        self._final = grace.Stopwatch(self.process.now)

    @property
    def failed(self) -> bool:
        """Whether this process claimed a failure or was interrupted, even if the script caught it."""
        return self._own.number > 0 or self.interrupted.is_set()

    def claim(self, exc: BaseException) -> bool:
        """Claim the exception as the first failure; False when another rank failed before."""
        if isinstance(exc, GeneratorExit) or (isinstance(exc, SystemExit) and exc.code in (None, 0)):
            return True
        spare = self.spare.free()
        try:
            if isinstance(exc, KeyboardInterrupt):
                self.interrupted.set()
                self.board.post(notes.Interrupted(self.rank))
                return True
            failure = self.board.failure(self._number_of(exc))
            return failure is None or failure.rank == self.rank
        finally:
            if spare:
                self.spare.hold()

    def _number_of(self, exc: BaseException) -> int:
        """The number of this exception's failure, which is claimed now unless it was before."""
        for link in chain(exc):
            pid, number = getattr(link, "_treadle_failure", (None, 0))
            if pid == self.pid:
                return int(number)
        number = self._own.number + 1
        hangs = lost_peer(exc)
        if hangs:
            self._placed = number  # the thread that watches would say that this thread is here, and not where it hung
            self.board.post(notes.Place(number, self.rank), place_of(exc))
            if not timed_out(exc):
                self._await_cause(number, exc)
        exc._treadle_failure = (self.pid, number)  # type: ignore[attr-defined]
        return self._record(format_exception(exc, self.rank), hangs)

    def _record(self, text: str, hangs: bool = False, status: int = 1) -> int:
        self._own = Failure(self._own.number + 1, self.rank, text, hangs, status, socket.gethostname())
        self.board.claim(self._own)
        self.board.post(notes.Failed(self._own.number, self.rank))
        return self._own.number

    def _await_cause(self, number: int, exc: BaseException) -> None:
        # Sockets close before anybody can see that their process died.
        def interrupted() -> bool:  # which the launcher has yet to pass on
            return self.board.has_launcher and self.board.has(notes.FinalInterrupt())

        self.process.wait(lambda: self.board.has(notes.FirstFailure(number)) or interrupted(), grace.CAUSE_WAIT)
        if not self.board.has(notes.FirstFailure(number)) and interrupted():
            interrupt = KeyboardInterrupt().with_traceback(exc.__traceback__)
            self.claim(interrupt)
            raise interrupt from None

    def go_down(self, exc: BaseException, show: Callable[[], None] | None = None) -> None:
        """Make the failure final, because its exception ends this process.

        Args:
            exc: The exception.
            show: Prints its traceback; None where the launching process does.
        """
        self.spare.free()
        interrupt = isinstance(exc, KeyboardInterrupt)
        if interrupt:
            self.claim(exc)
            self.board.post(notes.FinalInterrupt())
            if self.board.has_launcher:  # which passes the interrupt on
                if self.board.spans_hosts:
                    self._tell_other_hosts()
                if self.launches and show is not None:
                    show()
                return
            number = self._record(f"rank {self.rank} was interrupted\n", status=_INTERRUPT_STATUS)
        else:
            number = self._number_of(exc)
        self.board.post(notes.Final(number))
        failure = self.board.failure(number)
        if failure is not None and failure.rank != self.rank:
            self.say_stopped(failure)
            if failure.status != 1 and not interrupt:  # it is not for this exception that the run ends
                self.process.end(failure.status)
        elif failure is not None and failure.status != 1 and not interrupt:  # another thread ends the run
            self.process.wait(lambda: self.board.has(notes.Reported(number)), grace.REPORT_WAIT)
            self.end(failure.status)
        elif show is not None:
            report(self.board, failure or self._own, self.process, show)
        elif failure is None:  # no note could be left, and the traceback would be lost
            self.process.say(str(self._own))

    def _tell_other_hosts(self) -> None:
        """Have the launches of other hosts end, too; that of this host needs no word of it."""
        number = self._own.number + 1
        for note in (notes.Reporting(number), notes.Reported(number)):
            self.board.post(note)
        self.board.post(notes.Final(self._record(f"rank {self.rank} was interrupted\n", status=_INTERRUPT_STATUS)))

    def end(self, status: int) -> NoReturn:
        """End this process for a final failure; where the board goes with it, the others see the failure first."""
        self.board.post(notes.Released(self.rank))
        if self.launches or self.board.goes_with_process:
            self.await_release(grace.BOARD_STAYS)
        if self.launches:
            self.board.remove()
        self.process.end(status)

    def end_run(self, reason: str, status: int) -> NoReturn:
        """End all processes of the launch with this status, and say the reason once, whichever ranks end it."""
        board, newest = self.board, self.board.newest_failure()
        is_first = newest is None or newest.status != status
        number = board.newest() + is_first
        board.post(notes.Place(number, self.rank), place_of_main_thread())
        if is_first:
            board.claim(Failure(number, self.rank, f"rank {self.rank}: {reason}\n", True, status, socket.gethostname()))
            board.post(notes.Final(number))
            if self.speaks:
                report(board, board.failure(number), self.process)
        board.post(notes.Failed(number, self.rank))
        self.end(status)

    def await_release(self, seconds: float) -> None:
        """Wait until the others need the board no longer, but no longer than so many seconds."""
        start = self.process.now()

        def released() -> bool:
            late = self.process.now() - start > grace.JOIN_WAIT
            waiting = [rank for rank in self.board.ranks if not self.board.has(notes.Released(rank))]
            return all(rank == self.rank or (late and not self.board.has(notes.Joined(rank))) for rank in waiting)

        self.process.wait(released, seconds)

    def say_stopped(self, failure: Failure) -> None:
        """Say once, in a line, that this rank stopped because another failed; the failure itself is printed before."""
        if self.board.post(notes.Stopped(failure.number, self.rank)) and self.speaks:
            self.process.wait(lambda: self.board.has(notes.Reported(failure.number)), grace.REPORT_WAIT)
            report(self.board, failure, self.process)  # the rank that failed may be busy with its clean-up
            what = "was interrupted" if failure.status == _INTERRUPT_STATUS else "failed"
            who = failure.who if failure.rank >= 0 else "the launching process"
            # What was printed there is not to be seen here.
            why = f": {failure.summary}" if failure.is_traceback and failure.host != socket.gethostname() else ""
            self.process.say(f"rank {self.rank} stopped because {who} {what}{why}")

    def look(self) -> None:
        """Look at the board once, and end this process if another rank's failure is final and the time is over."""
        self.note_place()
        if not self.ends_itself:
            return
        failure = self.board.final_failure()
        if failure is not None and failure.rank == self.rank:
            failure = None
        seconds = self._final.seconds(failure is not None)
        if failure is not None:
            failed = self.board.has(notes.Failed(failure.number, self.rank))
            if grace.due(grace.FAILING if failed else grace.STUCK, seconds) >= grace.Step.END:
                self.say_stopped(failure)
                self.end(failure.status)

    def note_place(self) -> None:
        """Answer other ranks, and say where this rank is if a collective failed on another rank."""
        for answer in tuple(self.answers):
            if not answer():
                self.answers.remove(answer)
        failure = self.board.newest_failure()
        if failure is not None and failure.number != self._placed:
            self._placed = failure.number
            if failure.hangs:
                self.board.post(notes.Place(failure.number, self.rank), place_of_main_thread())

    def report_death(self, rank: int) -> None:
        """Claim and report the failure of another rank, whose process is gone without a word."""
        if self.board.final_failure() is None:  # else that is why it is gone
            process = self.process if self.ends_itself else None
            claim_death(self.board, rank, f"rank {rank} died and left no traceback\n", process)

    def check_launcher(self, is_alive: Callable[[], bool]) -> None:
        """End this process if the launching process is gone; the first rank to notice says so."""
        if is_alive():
            return
        with self.ending:
            self.board.post(notes.Place(self.board.newest() + 1, self.rank), place_of_main_thread())
            if self.board.post(notes.LauncherDied()):
                rank, who = -1, "the launching process"  # which has no rank, where it runs a function or a script
                if self.speaks and self.board.launcher_is_rank:
                    rank, who = self.board.ranks[0], f"rank {self.board.ranks[0]}, the launching process,"
                sentence = f"{who} died without a traceback; rank {self.rank} and the others stop\n"
                claim_death(self.board, rank, sentence, self.process)
                self.process.sleep(3 * grace.LOOK_INTERVAL)  # the others look at the board before it goes
                self.board.remove()
            self.process.end(1)
