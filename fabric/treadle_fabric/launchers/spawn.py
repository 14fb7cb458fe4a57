"""Makes new processes out of this one, and gives back what rank 0 returns."""

from __future__ import annotations

import contextlib
import copyreg
import functools
import io
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeAlias, TypeVar

import torch

from treadle_fabric.environments.environment import ClusterEnvironment
from treadle_fabric.errors import MisconfigurationException, ProcessFailedError
from treadle_fabric.failures import grace, notes
from treadle_fabric.failures.folder_board import FolderBoard
from treadle_fabric.failures.member import Member
from treadle_fabric.failures.membership import join_launch
from treadle_fabric.failures.notes import Failure
from treadle_fabric.failures.process import THIS_PROCESS
from treadle_fabric.failures.report import report, whereabouts
from treadle_fabric.launchers.launcher import (
    LAUNCH_DIR_VARIABLE,
    Launcher,
    put_variables,
    rank_variables,
    threads_per_process,
)
from treadle_fabric.launchers.supervisor import Supervisor
from treadle_fabric.randomness.state import collect_rng_states, set_rng_states

__all__ = ["SpawnLauncher", "StartMethod"]

T = TypeVar("T")
StartMethod = Literal["spawn", "fork", "forkserver"]

_Call: TypeAlias = tuple[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]]
_RESULT = "result.pt"
_TERMINATED = 128 + signal.SIGTERM


class SpawnLauncher(Launcher):
    """Runs the function in new processes, all ranks of them, and waits. What rank 0 returns comes back.

    Objects travel to the processes as copies: what the function does to them does not show in the caller's process.

    Args:
        environment: Gives the address and port where the ranks meet.
        num_processes: Processes to start.
        start_method: ``"spawn"`` and ``"forkserver"`` start fresh interpreters and pickle the function and its
            arguments; ``"fork"`` copies this process, is quick and works in notebooks, but not once CUDA was used; on
            the CPU its processes compute with one thread each.
    """

    def __init__(
        self, environment: ClusterEnvironment, num_processes: int, start_method: StartMethod = "spawn"
    ) -> None:
        if start_method not in multiprocessing.get_all_start_methods():
            raise MisconfigurationException(
                f"start_method={start_method!r} is not there on this system; choose one of "
                f"{multiprocessing.get_all_start_methods()}."
            )
        self._environment = environment
        self._num_processes = num_processes
        self._start_method = start_method
        self._processes: dict[int, BaseProcess] = {}

    @property
    def is_interactive_compatible(self) -> bool:
        return self._start_method == "fork"

    def launch(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        self._check_start()
        variables = rank_variables(self._environment, self._num_processes)
        if self._start_method == "fork":
            variables["OMP_NUM_THREADS"] = "1"  # a fork has the thread pool's memory, not its threads, and would wait
        elif "OMP_NUM_THREADS" not in os.environ:
            variables["OMP_NUM_THREADS"] = str(threads_per_process(self._num_processes))
        board = FolderBoard.create(range(self._num_processes))
        variables[LAUNCH_DIR_VARIABLE] = str(board.directory)
        context = multiprocessing.get_context(self._start_method)
        # A fork shares its memory by itself; everything else goes through a pickle.
        copied: Callable[[_Call], Any] = tuple if self._start_method == "fork" else _Copied
        task = copied((function, args, kwargs))
        # Python seeds its own generator anew in a fork, and all of them in a fresh interpreter.
        seed = copied((set_rng_states, (collect_rng_states(include_cuda=False),), {}))
        try:
            for rank in board.ranks:
                rank_vars = variables | {"LOCAL_RANK": str(rank)}
                process = context.Process(target=_run, args=(task, seed, board, rank, rank_vars))  # type: ignore[attr-defined]
                before = put_variables(rank_vars)  # fresh interpreters import the script before they get to _run
                try:
                    process.start()
                finally:
                    put_variables(before)
                self._processes[rank] = process
            with self._passing_on_sigterm():
                failure = self._wait(Supervisor(board, reports=False))
            if failure is not None:
                self._raise(failure, board)
            result: T = torch.load(board.directory / _RESULT, map_location="cpu", weights_only=False)
            return result
        finally:
            self._end_all()
            board.remove()

    def kill(self, signum: int) -> None:
        for rank in self._processes:
            self._send(rank, signum)

    def _send(self, rank: int, signum: int) -> None:
        process = self._processes[rank]
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signum)

    @contextlib.contextmanager
    def _passing_on_sigterm(self) -> Iterator[None]:
        """The processes end as SIGTERM asks for, a trainer in them after a checkpoint, and then this one does."""
        in_main = threading.current_thread() is threading.main_thread()
        # Another handler may be one that Python cannot put back.
        if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            yield
            return
        signal.signal(signal.SIGTERM, lambda number, frame: self.kill(number))
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _check_start(self) -> None:
        if self._start_method == "fork" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            raise MisconfigurationException(
                "CUDA was used in this process already, and a forked process cannot use it again. Move the CUDA calls "
                "before the launch into the launched function, restart the notebook if it is one, or use "
                "strategy='ddp' or 'ddp_spawn'."
            )

    def _wait(self, supervisor: Supervisor) -> Failure | None:
        """Wait until all have ended; returns the failure because of which they did, if there was one."""
        while True:
            running = [rank for rank, process in self._processes.items() if process.is_alive()]
            failure = supervisor.look({rank: process.exitcode for rank, process in self._processes.items()})
            if not running:
                return failure
            for rank, signum in supervisor.overdue(failure, running).items():
                self._send(rank, signum)
            sentinels = [self._processes[rank].sentinel for rank in running]
            multiprocessing.connection.wait(sentinels, timeout=grace.LOOK_INTERVAL)

    def _raise(self, failure: Failure, board: FolderBoard) -> NoReturn:
        statuses = {process.exitcode or 0 for process in self._processes.values()}
        ended = all(board.has(notes.Failed(failure.number, rank)) for rank in board.ranks)  # by SystemExit, or an error
        if statuses == {_TERMINATED} or (ended and len(statuses) == 1 and min(statuses) >= 0 and statuses != {1}):
            if failure.hangs:
                report(board, failure, THIS_PROCESS)
            raise SystemExit(statuses.pop())
        raise ProcessFailedError(str(failure) + whereabouts(board, failure, THIS_PROCESS))

    def _end_all(self) -> None:
        """Leave no process behind; the processes first hear of an interrupt."""
        start = time.monotonic()
        for step, after in grace.INTERRUPTED.items():
            for process in self._processes.values():
                process.join(max(0.0, start + after - time.monotonic()))
            self.kill(grace.SIGNALS[step])
        for process in self._processes.values():
            process.join(2)
        self._processes = {}


class _Copied:
    """A call to make in another process.

    Torch would hand tensors over in shared memory, and all ranks would then train the same weights.
    """

    def __init__(self, call: _Call) -> None:
        self._call = call

    def __reduce__(self) -> tuple[Any, ...]:
        buffer = io.BytesIO()
        pickler = ForkingPickler(buffer, pickle.HIGHEST_PROTOCOL)
        pickler.dispatch_table = {
            kind: reduce
            for kind, reduce in {**copyreg.dispatch_table, **ForkingPickler._extra_reducers}.items()  # type: ignore[attr-defined]
            if not getattr(reduce, "__module__", "").startswith("torch.")
        }
        try:
            pickler.dump(self._call)
        except Exception as exc:
            raise MisconfigurationException(
                f"The function to launch, {self._call[0]!r}, or its arguments cannot be pickled ({exc}), and a new "
                "process gets them so. Define the function, and the classes of its arguments, at the top level of a "
                "module, or use strategy='ddp' or 'ddp_fork'."
            ) from exc
        return (pickle.loads, (buffer.getvalue(),))


def _run(task: _Call, seed: _Call, board: FolderBoard, rank: int, variables: Mapping[str, str]) -> None:
    os.environ.update(variables)
    if "OMP_NUM_THREADS" in variables:
        torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    member = Member(board, rank, speaks=False)
    join_launch(member, functools.partial(member.check_launcher, launcher.is_alive))
    function, args, kwargs = task
    set_states, states, _ = seed
    try:
        set_states(*states)
        result = function(*args, **kwargs)
        if rank == 0:
            _save_result(result, board.directory)
    except KeyboardInterrupt as exc:
        member.claim(exc)
        sys.exit(128 + signal.SIGINT)
    except BaseException as exc:
        member.go_down(exc)
        if isinstance(exc, SystemExit):
            raise
        sys.exit(1)


def _save_result(result: Any, directory: Path) -> None:
    try:
        torch.save(result, directory / _RESULT)
    except Exception as exc:
        raise MisconfigurationException(
            f"The launched function returned a {type(result).__name__}, which cannot be pickled ({exc}), and goes back "
            "to the calling process so. Return tensors, numbers and plain containers."
        ) from exc
