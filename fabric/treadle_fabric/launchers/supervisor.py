"""What a launcher does for the processes that it started: tells of those that died, and ends those that are overdue."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping

from treadle_fabric.coordination import WaitMessages, list_ranks
from treadle_fabric.failures import grace, notes
from treadle_fabric.failures.board import Board
from treadle_fabric.failures.notes import Failure
from treadle_fabric.failures.process import THIS_PROCESS, Process
from treadle_fabric.failures.report import claim_death, describe_exit

__all__ = ["Supervisor"]


class Supervisor:
    """Looks after started processes, of which it knows only the exit statuses and what they leave on the board.

    Args:
        board: The board of the launch.
        reports: Whether the death of a process is printed here. Not so where the launching process raises it.
        process: The launching process; tests give one with a clock of its own.
    """

    def __init__(self, board: Board, reports: bool = True, process: Process = THIS_PROCESS) -> None:
        self.explained: set[int] = set()
        """The ranks whose end needs no more explanation."""
        self.seconds = 0.0
        """For how long a failure has been final."""
        self._board = board
        self._reporter = process if reports else None
        self._final = grace.Stopwatch(process.now)
        self._all_joined = False
        self._late: list[int] = []  # the ranks that run and have not come to the launch
        self._messages = WaitMessages(self._describe_late, process.now, process.say)

    def look(self, statuses: Mapping[int, int | None]) -> Failure | None:
        """Explain the processes that have ended since the last look, and return the failure because of which all stop.

        Args:
            statuses: Exit status of the process of each rank, negative for a signal, None while it runs.
        """
        for rank, status in statuses.items():
            if status is not None and rank not in self.explained:
                self.explained.add(rank)
                self._explain(rank, status)
        if self._reporter is None:  # where the launching process is a rank, it says so where it waits for the others
            self._look_for_late(rank for rank, status in statuses.items() if status is None)
        failure = self._board.final_failure()
        self.seconds = self._final.seconds(failure is not None)
        return failure

    def _look_for_late(self, running: Iterable[int]) -> None:
        if not self._all_joined:
            self._late = [rank for rank in running if not self._board.has(notes.Joined(rank))]
            self._all_joined = not self._late
        if not self._all_joined:
            self._messages.look()

    def _describe_late(self, seconds: float) -> str:
        late = f"{list_ranks(self._late)} of {len(self._board.ranks)}"
        return (
            f"The launching process has waited {seconds:.0f} s for {late}. Their processes run, and have not got to "
            "the launched function; they may still import the script."
        )

    def _explain(self, rank: int, status: int) -> None:
        board = self._board
        joined = board.has(notes.Joined(rank))
        if status == 0 and joined:
            board.post(notes.Ended(rank))
            return
        failure = board.newest_failure()
        if failure is not None and (
            failure.rank == rank
            or (status > 0 and board.has(notes.Failed(failure.number, rank)))
            or board.is_final(failure.number)
        ):
            board.post(notes.Final(failure.number))
        else:
            claim_death(board, rank, describe_exit(rank, status, joined), self._reporter)

    def overdue(self, failure: Failure | None, running: Iterable[int]) -> dict[int, signal.Signals]:
        """The signals for the ranks that still run although the failure has been final for too long."""
        if failure is None:
            return {}
        failed = {rank: self._board.has(notes.Failed(failure.number, rank)) for rank in running}
        steps = {rank: grace.due(grace.FAILING if failed[rank] else grace.STUCK, self.seconds) for rank in failed}
        return {rank: grace.SIGNALS[step] for rank, step in steps.items() if step in grace.SIGNALS}
