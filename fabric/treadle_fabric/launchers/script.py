"""Starts a script in every process, for ``treadle-fabric run``; the launching process is no rank."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

from treadle_fabric.environments.environment import ClusterEnvironment
from treadle_fabric.failures import grace, notes
from treadle_fabric.failures.folder_board import FolderBoard
from treadle_fabric.failures.notes import Failure
from treadle_fabric.failures.process import THIS_PROCESS
from treadle_fabric.failures.report import report
from treadle_fabric.launchers.launcher import LAUNCH_DIR_VARIABLE, rank_variables, threads_per_process
from treadle_fabric.launchers.supervisor import Supervisor

__all__ = ["run_script"]

_SIGINT_STATUS = (-signal.SIGINT, 128 + signal.SIGINT)


def run_script(
    command: Sequence[str],
    environment: ClusterEnvironment,
    num_processes: int,
    num_nodes: int = 1,
    variables: Mapping[str, str] | None = None,
) -> int:
    """Run a command once for each rank of this machine, and wait for all of them.

    Where one fails, all end, and the failure is printed once. Ctrl-C and SIGTERM are passed on.

    Args:
        command: The program and its arguments.
        environment: Gives the rank of this machine, and the address and port where the ranks meet.
        num_processes: Processes on this machine.
        num_nodes: Machines.
        variables: Further environment variables of the processes.

    Returns:
        The exit status: 0, or that of the rank that failed first; 128 and its number for a signal.
    """
    ranked = rank_variables(environment, num_processes, num_nodes)
    first = environment.node_rank() * num_processes
    board = FolderBoard.create(range(first, first + num_processes), is_rank=False)
    environ = {"OMP_NUM_THREADS": str(threads_per_process(num_processes)), **os.environ, **(variables or {})}
    environ |= ranked | {LAUNCH_DIR_VARIABLE: str(board.directory)}
    script = _Script(board)
    try:
        with script.passing_on_signals():
            for local_rank in range(num_processes):
                script.start(first + local_rank, command, environ | {"LOCAL_RANK": str(local_rank)})
            return script.wait()
    finally:
        script.end_all()
        board.remove()


class _Script:
    """The processes of a script, by rank.

    Args:
        board: The board of the launch.
    """

    def __init__(self, board: FolderBoard) -> None:
        self._board = board
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._supervisor = Supervisor(board)
        self._interrupted: float | None = None  # when
        self._told_of_interrupt = False

    def start(self, rank: int, command: Sequence[str], environ: Mapping[str, str]) -> None:
        # Only one process can have the user's key strokes.
        stdin = subprocess.DEVNULL if self._processes else None
        self._processes[rank] = subprocess.Popen(command, env=environ, stdin=stdin)

    @contextmanager
    def passing_on_signals(self) -> Iterator[None]:
        """Within the context, SIGTERM goes to the processes, and Ctrl-C is noted."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {signal.SIGINT: self._note_interrupt, signal.SIGTERM: self._pass_on}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note_interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupted, self._told_of_interrupt = time.monotonic(), False

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        for process in self._running().values():
            process.send_signal(number)

    def wait(self) -> int:
        """Wait for the processes; returns the exit status."""
        while True:
            self._look_for_interrupt()
            running = self._running()
            failure = self._supervisor.look(self._statuses())
            if failure is not None:
                if failure.rank not in running or self._supervisor.seconds > grace.REPORT_WAIT:
                    report(self._board, failure, THIS_PROCESS)
                for rank, signum in self._supervisor.overdue(failure, running).items():
                    running[rank].send_signal(signum)
            if not running:
                return self._status(failure)
            time.sleep(0.05 if failure is None else grace.LOOK_INTERVAL)

    def end_all(self) -> None:
        """Leave no process behind, whatever happened here."""
        for process in self._running().values():
            process.kill()
        for process in self._processes.values():
            process.wait()

    def _running(self) -> dict[int, subprocess.Popen[bytes]]:
        return {rank: process for rank, process in self._processes.items() if process.poll() is None}

    def _statuses(self) -> dict[int, int | None]:
        """The exit statuses; a process that ended well without a launch counts as running until another one launches.

        A script need not launch anything, and where it does, the others would wait for the process that did not.
        """
        statuses = {rank: process.returncode for rank, process in self._processes.items()}
        if any(self._board.has(notes.Joined(rank)) for rank in statuses):
            return statuses
        return {rank: status or None for rank, status in statuses.items()}

    def _look_for_interrupt(self) -> None:
        """Pass an interrupt on to the processes that have not seen it, and see that those which hang end, too."""
        ended = [rank for rank, process in self._processes.items() if process.poll() in _SIGINT_STATUS]
        if self._interrupted is None and any(rank not in self._supervisor.explained for rank in ended):
            self._interrupted = time.monotonic()  # of one process alone
        if self._interrupted is None:
            return
        seen = {rank for rank in self._processes if rank in ended or self._board.has(notes.Interrupted(rank))}
        self._supervisor.explained |= {rank for rank in seen if self._processes[rank].returncode is not None}
        step = grace.due(grace.INTERRUPTED, time.monotonic() - self._interrupted)
        waits = {rank: process for rank, process in self._running().items() if rank not in seen}
        if step >= grace.Step.INTERRUPT and not self._told_of_interrupt:
            self._told_of_interrupt = True
            for process in waits.values():
                process.send_signal(signal.SIGINT)
        if step >= grace.Step.TERMINATE:
            final = self._board.has(notes.FinalInterrupt())
            for rank, process in self._running().items():
                # one that handles the interrupt goes on, unless it waits for another that does not
                if final or (rank in waits and self._board.has(notes.Joined(rank))):
                    process.send_signal(grace.SIGNALS[step])

    def _status(self, failure: Failure | None) -> int:
        statuses = [process.returncode for process in self._processes.values()]
        if failure is not None and failure.status != 1:
            return failure.status
        if failure is not None and failure.rank in self._processes:
            statuses.insert(0, self._processes[failure.rank].returncode)
        status = next((status for status in statuses if status != 0), 0)
        return status if status >= 0 else 128 - status
