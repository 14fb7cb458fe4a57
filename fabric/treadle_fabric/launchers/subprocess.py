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
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed

from treadle_fabric.environments.environment import ClusterEnvironment
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.launchers.board import Failure, LaunchDirectory
from treadle_fabric.launchers.failures import (
    ENDED,
    GRACE_FAILING,
    GRACE_STUCK,
    LAUNCH_DIR_VARIABLE,
    POLL_INTERVAL,
    Member,
    call_guarded,
    current_member,
    describe_exit,
    end_process,
    failure_of_dead,
    join_launch,
    leave_launch,
    report,
)
from treadle_fabric.launchers.launcher import Launcher, limit_threads, threads_per_process
from treadle_fabric.launchers.listener import SignalListener

__all__ = ["SubprocessLauncher", "in_notebook", "launched_here", "settle"]

T = TypeVar("T")

# Scripts change their folder; what is started again must start where the first process did.
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
        if self._num_processes * self._num_nodes > 1:
            global _children
            if _children is not None and _children.is_over():
                _children.check_relaunch()
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
        return call_guarded(function, *args, **kwargs)

    def kill(self, signum: int) -> None:
        if _children is not None:
            _children.send(signum)


class _Children:
    """The processes started by this one, and the thread that looks after them."""

    def __init__(
        self, member: Member, processes: dict[int, subprocess.Popen[bytes]], environ_before: dict[str, str | None]
    ) -> None:
        self._member = member
        self._board = member.board
        self._processes = processes
        self._environ_before = environ_before
        self._main_is_done = threading.Event()
        self._over = threading.Event()
        self._interrupts = _Interrupts()
        self._test = _test_runner_name()
        self._explained: set[int] = set()
        self.owner = os.getpid()
        atexit.register(self._wait_at_exit)
        threading.Thread(target=self._watch, name="treadle-watch-processes", daemon=True).start()

    @classmethod
    def start(cls, environment: ClusterEnvironment, num_processes: int, num_nodes: int) -> _Children:
        command = _command()
        node_rank = environment.node_rank()
        ranks = [node_rank * num_processes + local_rank for local_rank in range(num_processes)]
        variables = {
            "MASTER_ADDR": environment.main_address,
            "MASTER_PORT": str(environment.main_port),
            "NODE_RANK": str(node_rank),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": str(num_processes),
            "WORLD_SIZE": str(num_processes * num_nodes),
        }
        environ_before = {name: os.environ.get(name) for name in variables}
        child_environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        child_environ.pop("PYTEST_CURRENT_TEST", None)
        child_environ.setdefault("OMP_NUM_THREADS", str(threads_per_process(num_processes)))
        board = LaunchDirectory.create(ranks)
        child_environ |= variables | {LAUNCH_DIR_VARIABLE: str(board.directory)}
        processes: dict[int, subprocess.Popen[bytes]] = {}
        try:
            for local_rank, rank in enumerate(ranks[1:], start=1):
                # Without a terminal of their own they would take the user's key strokes from rank 0.
                processes[rank] = subprocess.Popen(
                    command,
                    env=child_environ | {"LOCAL_RANK": str(local_rank)},
                    cwd=_START_DIRECTORY,
                    stdin=subprocess.DEVNULL,
                )
        except OSError:
            for process in processes.values():
                process.kill()
            board.remove()
            raise
        limit_threads(num_processes)
        os.environ.update(variables)
        member = join_launch(Member(board, ranks[0], ranks, launcher_is_alive=None))
        return cls(member, processes, environ_before)

    @property
    def num_processes(self) -> int:
        return len(self._processes) + 1

    def is_over(self) -> bool:
        # Processes that have just ended need a moment to be noticed.
        return self._over.wait(0 if self._running() else 5)

    def check_relaunch(self) -> None:
        # New processes would run the script from its beginning, and this one is in the middle of it.
        if self._test is None or self._test == _test_runner_name():
            raise MisconfigurationException(
                "The other processes of this script have ended, and it cannot launch again. After a failure, run the "
                "script again; for several launches that do not depend on each other use strategy='ddp_spawn'."
            )

    def wait_for_earlier_test(self) -> None:
        if self._test is not None and self._test != _test_runner_name():
            self._over.wait()

    def send(self, signum: int) -> None:
        for process in self._running().values():
            process.send_signal(signum)

    def _running(self) -> dict[int, subprocess.Popen[bytes]]:
        return {rank: process for rank, process in self._processes.items() if process.poll() is None}

    def _wait_at_exit(self) -> None:
        if os.getpid() != self.owner:
            return
        if self._over.is_set():
            self.forget()
            return
        self._main_is_done.set()
        if not self._member.failed:
            self._board.post(f"ended_{self._member.rank}", ENDED)
        dist = torch.distributed
        if dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()  # whoever still waits for this rank learns that it does not come
        self._over.wait()

    def _watch(self) -> None:
        final_since: float | None = None
        while True:
            running = self._running()
            if (
                self._member.interrupted.is_set()
                or self._interrupts.seen()
                or any(
                    process.poll() in _SIGINT_STATUS and rank not in self._explained
                    for rank, process in self._processes.items()
                )
            ):
                self._interrupt()
                continue
            self._claim_deaths()
            self._member.note_place()
            number = self._board.latest()
            failure = self._board.failure(number)
            if failure is not None and self._board.is_final(number, self._member.ranks):
                final_since = final_since or time.monotonic()
                if self._stop(number, failure, time.monotonic() - final_since):
                    break
            elif running:
                final_since = None
            else:
                break
            time.sleep(0.05 if final_since is None else POLL_INTERVAL)
        self._finish()

    def _claim_deaths(self) -> None:
        for rank, process in self._processes.items():
            status = process.poll()
            if status is None or rank in self._explained:
                continue
            self._explained.add(rank)
            joined = self._board.has(f"joined_{rank}")
            if status == 0 and joined:
                self._board.post(f"ended_{rank}", ENDED)
                continue
            number = self._board.latest()
            failure = self._board.failure(number)
            if failure is not None and (
                failure.rank == rank
                or self._board.has(f"stopped_{number}_{rank}")
                or (status > 0 and self._board.has(f"failed_{number}_{rank}"))
                or self._board.is_final(number, self._member.ranks)
            ):
                self._board.post(f"final_{number}")
                continue
            self._board.claim(
                number + 1, failure_of_dead(self._board, rank, describe_exit(rank, status, joined) + "\n")
            )
            self._board.post(f"final_{number + 1}")
            report(self._board, number + 1, self._member.ranks)

    def _stop(self, number: int, failure: Failure, seconds: float) -> bool:
        """End what has not ended by itself; True when nothing is left to do."""
        running = self._running()
        here = self._member.rank
        if failure.rank != here and (failure.rank not in running or seconds > 1):
            report(self._board, number, self._member.ranks)
        for rank, process in running.items():
            failed_too = self._board.has(f"failed_{number}_{rank}")
            grace = (GRACE_FAILING if failed_too else GRACE_STUCK) + 0.6  # it ends itself before that, and says so
            if seconds > grace + 1.2:
                process.kill()
            elif seconds > grace:
                process.terminate()
        if running:
            return False
        if failure.rank == here:
            return True  # its own exception is on its way, or was handled
        if self._main_is_done.is_set() or not self._board.has(f"failed_{number}_{here}"):
            if self._main_is_done.is_set() or seconds > GRACE_STUCK + 1:
                self._end(number)
        elif _test_runner_name() is not None:
            return True  # a test failed, and the others are still to run
        elif seconds > GRACE_FAILING + 1.5:
            self._end(number)
        return False

    def _end(self, number: int) -> None:
        report(self._board, number, self._member.ranks)
        self._member.say_stopped(number)
        failure = self._board.failure(number)
        self._board.remove()
        end_process(1 if failure is None else failure.status)

    def _interrupt(self) -> None:
        """Pass an interrupt on to the processes, this one included, that have not seen it."""
        start = time.monotonic()
        told = False
        while True:
            running = self._running()
            seconds = time.monotonic() - start
            if not running and self._member.interrupted.is_set():
                break
            if seconds > 0.5 and not told:
                told = True
                for rank, process in running.items():
                    if not self._board.has(f"interrupted_{rank}"):
                        process.send_signal(signal.SIGINT)
                if not (self._member.interrupted.is_set() or self._interrupts.heard or self._main_is_done.is_set()):
                    _thread.interrupt_main()
            if told and not self._board.has("final_interrupt") and not self._main_is_done.is_set():
                if self._member.interrupted.is_set():
                    break  # the script handled the interrupt and goes on
            if seconds > 7:
                for process in running.values():
                    process.kill()
                if not running:
                    self._board.remove()
                    end_process(128 + signal.SIGINT)
            elif seconds > 4:
                self.send(signal.SIGTERM)
            time.sleep(POLL_INTERVAL)
        self._explained |= {
            rank
            for rank, process in self._processes.items()
            if (status := process.poll()) in _SIGINT_STATUS
            or (status is not None and self._board.has(f"interrupted_{rank}"))  # while it went down with an error
        }
        self._member.interrupted.clear()
        self._interrupts.heard = False

    def _finish(self) -> None:
        for name, value in self._environ_before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        failure = self._board.failure(self._board.latest())
        failed_here = failure is not None and failure.rank == self._member.rank
        if self._main_is_done.is_set() or not (failed_here or torch.distributed.is_initialized()):
            self.forget()
        self._interrupts.close()
        self._over.set()

    def forget(self) -> None:
        """Take the board away; as long as a collective may still fail here, it tells who had ended."""
        if current_member() is self._member:
            leave_launch()
        self._board.remove()


class _Interrupts:
    """Hears of an interrupt while the main thread, whose business it is, waits in a collective."""

    def __init__(self) -> None:
        self.heard = False
        self._since: float | None = None
        self._listener = SignalListener(self._note)

    def _note(self, number: int) -> None:
        # A handler of the user's is left alone
        if number == signal.SIGINT and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._since = time.monotonic()

    def seen(self) -> bool:
        """Whether SIGINT came a while ago and nothing has come of it."""
        if self._since is None or time.monotonic() - self._since < 1:
            return False
        self._since = None
        self.heard = True
        return True

    def close(self) -> None:
        """Listen no longer."""
        self._listener.close()


_children: _Children | None = None


def launched_here() -> bool:
    """Whether this process started others that still run: the environment looks then as if somebody else had."""
    return _children is not None and _children.owner == os.getpid() and not _children.is_over()


def settle() -> None:
    """Let the processes of an earlier test end, which still show in the environment. Outside of pytest: nothing."""
    if _children is not None:
        _children.wait_for_earlier_test()


def in_notebook() -> bool:
    """Whether this is a notebook or an interactive prompt, where there is no script to start again."""
    if hasattr(sys, "ps1"):
        return True
    shell = sys.modules.get("IPython")
    return shell is not None and shell.get_ipython() is not None


def _command() -> list[str]:
    """What to run to get this process again, interpreter flags and ``-m`` included."""
    test = _test_runner_name()
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


def _test_runner_name() -> str | None:
    """The test that runs, as an argument for pytest, if this process is pytest. It must not run all tests again."""
    name = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
    program = Path(sys.argv[0] if sys.argv else "")
    if not name or not (program.stem in ("pytest", "py.test") or program.parent.name == "pytest"):
        return None
    file, separator, test = name.partition("::")
    start = Path(_START_DIRECTORY or ".")
    folder = next((folder for folder in (start, *start.parents) if (folder / file).exists()), start)
    return str(folder / file) + separator + test
