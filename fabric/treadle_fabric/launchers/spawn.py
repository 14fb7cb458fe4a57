"""Makes new processes out of this one, and gives back what rank 0 returns."""

from __future__ import annotations

import contextlib
import copyreg
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
from typing import Any, Literal, TypeAlias, TypeVar

import torch

from treadle_fabric.environments.environment import ClusterEnvironment
from treadle_fabric.errors import MisconfigurationException, ProcessFailedError
from treadle_fabric.launchers.board import Failure, LaunchDirectory
from treadle_fabric.launchers.failures import (
    ENDED,
    GRACE_FAILING,
    GRACE_STUCK,
    LAUNCH_DIR_VARIABLE,
    Member,
    describe_exit,
    failure_of_dead,
    join_launch,
    report,
    whereabouts,
)
from treadle_fabric.launchers.launcher import Launcher, threads_per_process
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
        node_rank = self._environment.node_rank()
        variables = {
            "MASTER_ADDR": self._environment.main_address,
            "MASTER_PORT": str(self._environment.main_port),
            "NODE_RANK": str(node_rank),
            "LOCAL_WORLD_SIZE": str(self._num_processes),
            "WORLD_SIZE": str(self._num_processes),
        }
        if self._start_method == "fork":
            variables["OMP_NUM_THREADS"] = "1"  # a fork has the thread pool's memory, not its threads, and would wait
        elif "OMP_NUM_THREADS" not in os.environ:
            variables["OMP_NUM_THREADS"] = str(threads_per_process(self._num_processes))
        ranks = list(range(self._num_processes))
        board = LaunchDirectory.create(ranks)
        variables[LAUNCH_DIR_VARIABLE] = str(board.directory)
        context = multiprocessing.get_context(self._start_method)
        # A fork shares its memory by itself; everything else goes through a pickle.
        copied: Callable[[_Call], Any] = tuple if self._start_method == "fork" else _Copied
        task = copied((function, args, kwargs))
        # Python seeds its own generator anew in a fork, and all of them in a fresh interpreter.
        seed = copied((set_rng_states, (collect_rng_states(include_cuda=False),), {}))
        try:
            for rank in ranks:
                rank_variables = variables | {"LOCAL_RANK": str(rank)}
                process = context.Process(  # type: ignore[attr-defined]
                    target=_run, args=(task, seed, str(board.directory), rank, ranks, rank_variables)
                )
                with _environ(rank_variables):  # fresh interpreters import the script before they get to _run
                    process.start()
                self._processes[rank] = process
            with self._passing_on_sigterm():
                failure = self._wait(board, ranks)
            if failure is not None:
                if {process.exitcode for process in self._processes.values()} == {_TERMINATED}:
                    if failure.hangs:
                        report(board, board.latest(), ranks)
                    raise SystemExit(_TERMINATED)
                raise ProcessFailedError(str(failure) + whereabouts(board, board.latest(), ranks))
            result: T = torch.load(board.directory / _RESULT, map_location="cpu", weights_only=False)
            return result
        finally:
            self._end_all()
            board.remove()

    def kill(self, signum: int) -> None:
        for process in self._processes.values():
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

    def _wait(self, board: LaunchDirectory, ranks: list[int]) -> Failure | None:
        """Until all have ended; the first failure if there was one."""
        final_since: float | None = None
        explained: set[int] = set()
        while True:
            running = {rank: process for rank, process in self._processes.items() if process.is_alive()}
            for rank, process in self._processes.items():
                status = process.exitcode
                if status is None or rank in explained:
                    continue
                explained.add(rank)
                if status == 0:
                    board.post(f"ended_{rank}", ENDED)
                else:
                    number = board.latest()
                    if number == 0 or not (
                        board.is_final(number, ranks) or (status > 0 and board.has(f"failed_{number}_{rank}"))
                    ):
                        number += 1
                        sentence = describe_exit(rank, status, board.has(f"joined_{rank}"))
                        board.claim(number, failure_of_dead(board, rank, sentence))
                    board.post(f"final_{number}")
            number = board.latest()
            failure = board.failure(number)
            final = failure is not None and board.is_final(number, ranks)
            if not running:
                return failure if final else None
            if not final:
                final_since = None
            else:
                final_since = final_since or time.monotonic()
                seconds = time.monotonic() - final_since
                for rank, process in running.items():
                    failed_too = board.has(f"failed_{number}_{rank}")
                    grace = (GRACE_FAILING if failed_too else GRACE_STUCK) + 0.6
                    if seconds > grace + 1.2:
                        process.kill()
                    elif seconds > grace:
                        process.terminate()
            multiprocessing.connection.wait([process.sentinel for process in running.values()], timeout=0.2)

    def _end_all(self) -> None:
        """Leave no process behind; after an interrupt they first hear of it."""
        for grace, signum in ((0.5, signal.SIGINT), (2.0, signal.SIGTERM), (2.0, signal.SIGKILL), (2.0, None)):
            deadline = time.monotonic() + grace
            for process in self._processes.values():
                process.join(max(0.0, deadline - time.monotonic()))
            if signum is not None:
                self.kill(signum)
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


def _run(
    task: _Call,
    seed: _Call,
    directory: str,
    rank: int,
    ranks: list[int],
    variables: Mapping[str, str],
) -> None:
    os.environ.update(variables)
    if "OMP_NUM_THREADS" in variables:
        torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    member = join_launch(Member(LaunchDirectory(directory), rank, ranks, launcher.is_alive, speaks=False))
    function, args, kwargs = task
    set_states, states, _ = seed
    try:
        set_states(*states)
        result = function(*args, **kwargs)
        if rank == 0:
            _save_result(result, Path(directory))
    except KeyboardInterrupt as exc:
        member.claim(exc)
        sys.exit(128 + signal.SIGINT)
    except SystemExit as exc:
        member.finish(exc)
        raise
    except BaseException as exc:
        member.finish(exc)
        sys.exit(1)


def _save_result(result: Any, directory: Path) -> None:
    try:
        torch.save(result, directory / _RESULT)
    except Exception as exc:
        raise MisconfigurationException(
            f"The launched function returned a {type(result).__name__}, which cannot be pickled ({exc}), and goes back "
            "to the calling process so. Return tensors, numbers and plain containers."
        ) from exc


@contextlib.contextmanager
def _environ(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
