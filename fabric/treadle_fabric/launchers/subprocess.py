"""Starts the script again, once for every further process."""

from __future__ import annotations

import _thread
import atexit
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed

from treadle_fabric.environments.environment import ClusterEnvironment
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.failures import grace, notes
from treadle_fabric.failures.board import Board
from treadle_fabric.failures.folder_board import FolderBoard
from treadle_fabric.failures.member import Member
from treadle_fabric.failures.membership import call_guarded, current_member, join_launch, leave_launch
from treadle_fabric.failures.notes import Failure
from treadle_fabric.failures.process import end_process
from treadle_fabric.failures.report import report
from treadle_fabric.launchers.launcher import (
    LAUNCH_DIR_VARIABLE,
    Launcher,
    limit_threads,
    put_variables,
    rank_variables,
    threads_per_process,
)
from treadle_fabric.launchers.listener import SignalListener
from treadle_fabric.launchers.supervisor import Supervisor
from treadle_fabric.launchers.under_pytest import running_test, without_pytest

__all__ = ["SubprocessLauncher", "in_notebook", "launched_here", "settle"]

T = TypeVar("T")

# Scripts change their folder, and the further processes must start where the first one did.
try:
    _START_DIRECTORY: str | None = os.getcwd()
except OSError:
    _START_DIRECTORY = None

_SIGINT_STATUS = (-signal.SIGINT, 128 + signal.SIGINT)


class SubprocessLauncher(Launcher):
    """Starts the script again for ranks 1 and up; rank 0 of the machine stays in the caller's process.

    Args:
        environment: Gives the rank of this machine, and the address and port where the ranks meet.
        num_processes: Processes on this machine.
        num_nodes: Machines. On each the user starts the script once.
    """

    def __init__(self, environment: ClusterEnvironment, num_processes: int, num_nodes: int = 1) -> None:
        self._environment = environment
        self._num_processes = num_processes
        self._num_nodes = num_nodes

    @property
    def is_interactive_compatible(self) -> bool:
        return False

    def launch(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        # Where each machine has one process, there is none to start, and none to look after.
        if self._num_processes > 1 or (self._num_nodes > 1 and _children is not None):
            self._start_processes()
        return call_guarded(function, *args, **kwargs)

    def _start_processes(self) -> None:
        global _children
        if _children is not None and _children.is_over():
            if not _children.are_of_earlier_test():  # new processes would run from the beginning a script half run here
                raise MisconfigurationException(
                    "The other processes of this script have ended, and it cannot launch again. After a failure, run "
                    "the script again; for several launches that do not depend on each other use "
                    "strategy='ddp_spawn'."
                )
            _children.forget()
            _children = None
        if _children is None:
            if current_member() is not None:
                raise MisconfigurationException(
                    "A launched process cannot launch processes of its own. Create the object that launches at the "
                    "top of the script, or ask for one device here."
                )
            _children = _Children.start(self._environment, self._num_processes, self._num_nodes)
        elif _children.num_processes != self._num_processes:
            raise MisconfigurationException(
                f"The script runs in {_children.num_processes} processes, and devices={self._num_processes} asks "
                f"for another number. Use the same number of devices throughout a script, or strategy='ddp_spawn', "
                "which starts processes for each call."
            )

    def kill(self, signum: int) -> None:
        if _children is not None:
            _children.send(signum)


class _Children:
    """The processes started by this one, and the thread that looks after them.

    Args:
        member: This process's part in the launch.
        processes: The started processes by rank.
        variables: Environment variables that the launch needs in this process, too.
    """

    def __init__(
        self, member: Member, processes: dict[int, subprocess.Popen[bytes]], variables: Mapping[str, str]
    ) -> None:
        self._member = member
        self._board = member.board
        self._processes = processes
        self._supervisor = Supervisor(member.board)
        self._variables_before = put_variables(variables)
        self._main_is_done = threading.Event()
        self.over = threading.Event()
        self._interrupts = _Interrupts()
        self._test = running_test(_START_DIRECTORY)
        self.owner = os.getpid()
        atexit.register(self._wait_at_exit)
        threading.Thread(target=self._watch, name="treadle-watch-processes", daemon=True).start()

    @classmethod
    def start(cls, environment: ClusterEnvironment, num_processes: int, num_nodes: int) -> _Children:
        command = _command()
        variables = rank_variables(environment, num_processes, num_nodes)
        first = environment.node_rank() * num_processes
        folder = FolderBoard.create(range(first, first + num_processes), is_all=num_nodes == 1)
        board: Board = folder
        if num_nodes > 1:
            from treadle_fabric.failures.hosts.linked_board import LinkedBoard  # for several hosts only

            board = LinkedBoard(folder)
        environ = {"OMP_NUM_THREADS": str(threads_per_process(num_processes)), **without_pytest(os.environ)}
        environ |= variables | {LAUNCH_DIR_VARIABLE: str(folder.directory)}
        processes: dict[int, subprocess.Popen[bytes]] = {}
        try:
            for local_rank in range(1, num_processes):
                # With rank 0's standard input they would take the user's key strokes from it.
                processes[first + local_rank] = subprocess.Popen(
                    command,
                    env=environ | {"LOCAL_RANK": str(local_rank)},
                    cwd=_START_DIRECTORY,
                    stdin=subprocess.DEVNULL,
                )
        except OSError:
            for process in processes.values():
                process.kill()
            board.remove()
            raise
        limit_threads(num_processes)
        member = join_launch(Member(board, first, launches=True))
        return cls(member, processes, variables | {"LOCAL_RANK": "0"})

    @property
    def num_processes(self) -> int:
        return len(self._processes) + 1

    def is_over(self) -> bool:
        # The thread that looks needs a moment to notice that the last process has ended.
        return self.over.wait(0 if self._running() else 5)

    def are_of_earlier_test(self) -> bool:
        return self._test is not None and self._test != running_test(_START_DIRECTORY)

    def send(self, signum: int) -> None:
        for process in self._running().values():
            process.send_signal(signum)

    def forget(self) -> None:
        """Take the board away; as long as a collective may still fail here, the board tells which ranks had ended."""
        if current_member() is self._member:
            leave_launch()
        self._board.remove()

    def _running(self) -> dict[int, subprocess.Popen[bytes]]:
        return {rank: process for rank, process in self._processes.items() if process.poll() is None}

    def _wait_at_exit(self) -> None:
        if os.getpid() != self.owner:
            return
        if self.over.is_set():
            self.forget()
            return
        self._main_is_done.set()
        if not self._member.failed:
            self._board.post(notes.Ended(self._member.rank))
        dist = torch.distributed
        if dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()  # a rank that still waits for this one learns that it does not come
        self.over.wait()

    def _watch(self) -> None:
        while True:
            if self._is_interrupted():
                self._pass_on_interrupt()
                continue
            running = self._running()
            failure = self._supervisor.look({rank: process.poll() for rank, process in self._processes.items()})
            self._member.note_place()
            if not running if failure is None else self._stop(failure, running):
                break
            quick = failure is None and not self._board.spans_hosts
            time.sleep(0.05 if quick else self._board.look_interval)
        self._finish()

    def _stop(self, failure: Failure, running: Mapping[int, subprocess.Popen[bytes]]) -> bool:
        """End the processes that have not ended by themselves; True when nothing is left to do."""
        here, seconds = self._member.rank, self._supervisor.seconds
        if failure.rank != here and (failure.rank not in running or seconds > grace.REPORT_WAIT):
            report(self._board, failure, self._member.process)
        for rank, signum in self._supervisor.overdue(failure, running).items():
            running[rank].send_signal(signum)
        if running:
            return False
        if failure.rank == here:
            return True  # its own exception is on its way, or was handled
        if not self._main_is_done.is_set():
            failed = self._board.has(notes.Failed(failure.number, here))
            if failed and self._test is not None:
                return True  # a test failed, and the others are still to run
            rule = grace.FAILING_LAUNCHER if failed else grace.STUCK_LAUNCHER
            if grace.due(rule, seconds) < grace.Step.END:
                return False
        report(self._board, failure, self._member.process)
        self._member.say_stopped(failure)
        self._board.remove()
        end_process(failure.status)

    def _is_interrupted(self) -> bool:
        failure = self._board.final_failure() if self._board.spans_hosts else None
        if failure is not None and failure.is_elsewhere:  # an interrupt, perhaps, which is that host's
            return False
        unexplained = (self._processes[rank] for rank in self._processes.keys() - self._supervisor.explained)
        return (
            self._member.interrupted.is_set()
            or self._interrupts.seen()
            or any(process.poll() in _SIGINT_STATUS for process in unexplained)
        )

    def _pass_on_interrupt(self) -> None:
        """Pass an interrupt on to the processes, this one included, that have not seen it."""
        start, told, here = time.monotonic(), False, self._member.interrupted
        while (running := self._running()) or not here.is_set():
            step = grace.due(grace.INTERRUPTED, time.monotonic() - start)
            if step >= grace.Step.INTERRUPT and not told:
                told = True
                for rank, process in running.items():
                    if not self._board.has(notes.Interrupted(rank)):
                        process.send_signal(signal.SIGINT)
                if not (here.is_set() or self._interrupts.heard or self._main_is_done.is_set()):
                    _thread.interrupt_main()
            if told and here.is_set() and not self._board.has(notes.FinalInterrupt()):
                if not self._main_is_done.is_set():
                    break  # the script handled the interrupt and goes on
            if step >= grace.Step.TERMINATE:
                self.send(grace.SIGNALS[step])
            if step is grace.Step.KILL and not running:
                self._board.remove()
                end_process(128 + signal.SIGINT)
            time.sleep(grace.LOOK_INTERVAL)
        self._supervisor.explained |= {
            rank
            for rank, process in self._processes.items()
            if (status := process.poll()) in _SIGINT_STATUS
            or (status is not None and self._board.has(notes.Interrupted(rank)))  # while it went down with an error
        }
        here.clear()
        self._interrupts.heard = False

    def _finish(self) -> None:
        put_variables(self._variables_before)
        failure = self._board.newest_failure()
        failed_here = failure is not None and failure.rank == self._member.rank
        if self._main_is_done.is_set() or not (failed_here or torch.distributed.is_initialized()):
            self.forget()
        self._interrupts.listener.close()
        self.over.set()


class _Interrupts:
    """Hears of an interrupt while the main thread, whose business it is, waits in a collective."""

    def __init__(self) -> None:
        self.heard = False
        self._since: float | None = None
        self.listener = SignalListener(self._note)

    def _note(self, number: int) -> None:
        # A handler of the user's is left alone.
        if number == signal.SIGINT and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._since = time.monotonic()

    def seen(self) -> bool:
        """Whether SIGINT came a while ago and nothing has come of it."""
        if self._since is None or time.monotonic() - self._since < 1:
            return False
        self._since = None
        self.heard = True
        return True


_children: _Children | None = None


def launched_here() -> bool:
    """Whether this process started others that still run; its environment variables look as if another one had."""
    return _children is not None and _children.owner == os.getpid() and not _children.is_over()


def settle() -> None:
    """Wait for the processes of an earlier test, which still show in the environment; outside of pytest do nothing."""
    if _children is not None and _children.are_of_earlier_test():
        _children.over.wait()


def in_notebook() -> bool:
    """Whether this is a notebook or an interactive prompt, where there is no script to start again."""
    shell = sys.modules.get("IPython")
    return hasattr(sys, "ps1") or (shell is not None and shell.get_ipython() is not None)


def _command() -> list[str]:
    """The command that this process was started with, interpreter flags and ``-m`` included."""
    test = running_test(_START_DIRECTORY)
    if test is not None:
        return [sys.executable, "-m", "pytest", test]
    arguments = sys.orig_argv[1:]
    main = sys.modules["__main__"]
    found = main.__spec__ is not None or "-c" in arguments or os.path.exists(getattr(main, "__file__", ""))
    if in_notebook() or not sys.executable or not found:
        raise MisconfigurationException(
            "strategy='ddp' starts the script again for every further process, and here is no script: this is a "
            "notebook, a prompt or a program read from standard input. Use strategy='ddp_notebook', or put the code "
            "in a file and run it with python."
        )
    return [sys.executable, *arguments]
