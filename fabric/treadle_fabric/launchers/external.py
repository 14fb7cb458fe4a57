"""Processes that something else started."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any, TypeVar

from treadle_fabric.environments.environment import ClusterEnvironment
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.launchers.board import LaunchDirectory
from treadle_fabric.launchers.failures import (
    LAUNCH_DIR_VARIABLE,
    Member,
    call_guarded,
    current_member,
    end_process,
    join_launch,
)
from treadle_fabric.launchers.launcher import Launcher

__all__ = ["ExternalLauncher"]

T = TypeVar("T")


class ExternalLauncher(Launcher):
    """For processes that torchrun, SLURM or MPI started, or a :class:`SubprocessLauncher` before: only calls.

    Args:
        environment: Where the ranks come from.
    """

    def __init__(self, environment: ClusterEnvironment) -> None:
        self._environment = environment

    @property
    def is_interactive_compatible(self) -> bool:
        return True

    def launch(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        join_launch_of_parent(self._environment)
        return call_guarded(function, *args, **kwargs)

    def kill(self, signum: int) -> None:
        """Nothing: who started the processes ends them."""


def join_launch_of_parent(environment: ClusterEnvironment) -> None:
    """Take part in the launch that the parent process announced in the environment, if it did."""
    directory = os.environ.get(LAUNCH_DIR_VARIABLE)
    if directory is None or current_member() is not None:
        return
    board = LaunchDirectory(directory)
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        # A new process imports the script, to find the function in it, and reached the launch on the way.
        rank = environment.global_rank()
        unguarded = MisconfigurationException(
            "Each new process imports the script again, and the script launches while it is imported. Put the launch "
            "under `if __name__ == '__main__':`."
        )
        Member(board, rank, [rank], None).finish(unguarded)
        end_process(1)
    try:
        launcher, ranks = board.launch_info()
    except FileNotFoundError:
        end_process(1)  # the launch is over, and this process is late
    if os.getppid() != launcher:
        if not _process_exists(launcher):
            end_process(1)
        return  # a script that a launched process started: it only inherited the variable
    rank = ranks[environment.local_rank()]
    join_launch(Member(board, rank, ranks, lambda: os.getppid() == launcher))


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
