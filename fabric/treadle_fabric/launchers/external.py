"""Processes that something else started."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
from collections.abc import Callable
from typing import Any, TypeVar

from treadle_fabric.environments.environment import ClusterEnvironment
from treadle_fabric.errors import MisconfigurationException
from treadle_fabric.failures.board import Board
from treadle_fabric.failures.folder_board import FolderBoard
from treadle_fabric.failures.member import Member
from treadle_fabric.failures.membership import call_guarded, current_member, join_launch
from treadle_fabric.failures.process import end_process
from treadle_fabric.launchers.launcher import LAUNCH_DIR_VARIABLE, Launcher

__all__ = ["ExternalLauncher"]

T = TypeVar("T")


class ExternalLauncher(Launcher):
    """Only calls the function, in processes that torchrun, SLURM, MPI or a :class:`SubprocessLauncher` started.

    Args:
        environment: Where the ranks come from.
    """

    def __init__(self, environment: ClusterEnvironment) -> None:
        self._environment = environment

    @property
    def is_interactive_compatible(self) -> bool:
        return True

    def launch(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        _join_launch_of_parent(self._environment)
        return call_guarded(function, *args, **kwargs)

    def kill(self, signum: int) -> None:
        """Nothing: who started the processes ends them."""


def _join_launch_of_parent(environment: ClusterEnvironment) -> None:
    """Take part in the launch that the parent process announced in the environment, if it did."""
    directory = os.environ.get(LAUNCH_DIR_VARIABLE)
    if directory is None or current_member() is not None:
        return
    try:
        board = FolderBoard.open(directory)
    except FileNotFoundError:
        end_process(1)  # the launch is over, and this process is late
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        # A new process imports the script, to find the function in it, and reached the launch on the way.
        unguarded = MisconfigurationException(
            "Each new process imports the script again, and the script launches while it is imported. Put the launch "
            "under `if __name__ == '__main__':`."
        )
        Member(board, environment.global_rank()).go_down(unguarded)
        end_process(1)
    if os.getppid() != board.launcher:
        try:
            with contextlib.suppress(PermissionError):
                os.kill(board.launcher, 0)
        except ProcessLookupError:
            end_process(1)
        return  # a script that a launched process started: it only inherited the variable
    shared: Board = board
    if not board.has_all_ranks:
        from treadle_fabric.failures.hosts.linked_board import LinkedBoard  # for several hosts only

        shared = LinkedBoard(board)
    member = Member(shared, board.ranks[environment.local_rank()])
    join_launch(member, functools.partial(member.check_launcher, lambda: os.getppid() == board.launcher))
