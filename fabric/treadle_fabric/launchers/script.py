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
    board = FolderBoard.create(range(first, first + num_processes), is_rank=False, is_all=num_nodes == 1)
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
        self._interrupts = 0
        self._interrupted = 0.0  # when, the last time
        self._told = False  # that the script goes on
        self._asked = False  # to end, so that an exit status tells of no failure

    def start(self, rank: int, command: Sequence[str], environ: Mapping[str, str]) -> None:
        # Only one process can have the user's key strokes; and in sessions of their own, they get each Ctrl-C once,
        # whether it was typed or sent to the launching process alone.
        stdin = subprocess.DEVNULL if self._processes else None
        self._processes[rank] = subprocess.Popen(command, env=environ, stdin=stdin, start_new_session=True)

    @contextmanager
    def passing_on_signals(self) -> Iterator[None]:
        """Within the context, Ctrl-C and signals that ask to end go to the processes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {signal.SIGINT: self._note_interrupt, signal.SIGTERM: self._ask, signal.SIGHUP: self._ask}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note_interrupt(self, number: int, frame: FrameType | None = None) -> None:
        self._interrupts += 1
        self._interrupted = time.monotonic()
        self._pass_on(signal.SIGINT)

    def _ask(self, number: int, frame: FrameType | None = None) -> None:
        self._asked = True
        self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        for process in self._running().values():
            process.send_signal(number)

    def wait(self) -> int:
        """Wait for the processes; returns the exit status."""
        while True:
            self._look_for_interrupt()
            running = self._running()
            failure = self._supervisor.look(self._statuses())
            if failure is not None:
                late = failure.rank not in running or self._supervisor.seconds > grace.REPORT_WAIT
                if late and (failure.hangs or not self._asked):
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
        """Where an interrupt ended one process, end all; a script that handles it may take its time."""
        ended = {rank for rank, process in self._processes.items() if process.poll() in _SIGINT_STATUS}
        if self._interrupts == 0 and ended - self._supervisor.explained:  # of one process alone
            self._note_interrupt(signal.SIGINT)
        if self._interrupts == 0:
            return
        self._supervisor.explained |= {
            rank
            for rank, process in self._processes.items()
            if rank in ended or (process.returncode is not None and self._board.has(notes.Interrupted(rank)))
        }
        step = grace.due(grace.INTERRUPTED, time.monotonic() - self._interrupted)
        if step < grace.Step.TERMINATE or not self._running():
            return
        if ended or self._interrupts > 1 or self._board.has(notes.FinalInterrupt()):
            self._pass_on(grace.SIGNALS[step])
        elif not self._told:
            self._told = True
            THIS_PROCESS.say("The script goes on after the interrupt. A second Ctrl-C ends it.")

    def _status(self, failure: Failure | None) -> int:
        statuses = [process.returncode for process in self._processes.values()]
        if failure is None and self._interrupts and any(statuses):
            return 128 + signal.SIGINT
        if failure is not None and failure.status != 1:
            return failure.status
        if failure is not None and failure.rank in self._processes:
            statuses.insert(0, self._processes[failure.rank].returncode)
        status = next((status for status in statuses if status != 0), 0)
        return status if status >= 0 else 128 - status
