"""What a launcher is."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["Launcher", "limit_threads", "threads_per_process"]

T = TypeVar("T")


class Launcher(ABC):
    """Gets a function to run in every process of a run."""

    @property
    @abstractmethod
    def is_interactive_compatible(self) -> bool:
        """Whether it works in a notebook or a Python prompt."""

    @abstractmethod
    def launch(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run ``function(*args, **kwargs)`` in every process, and return rank 0's result in the caller's process.

        The first call makes the processes; later ones find them there. An exception that leaves the function ends all
        processes within ten seconds, and the first one's traceback is shown once.

        Raises:
            ProcessFailedError: if another process failed first.
        """

    @abstractmethod
    def kill(self, signum: int) -> None:
        """Send a signal to the processes that this launcher started and that still run."""


def threads_per_process(num_processes: int) -> int:
    """An even share of the cores for each process, at least 1."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        cores = os.cpu_count() or 1
    return max(1, cores // max(1, num_processes))


def limit_threads(num_processes: int) -> None:
    """Keep processes from competing for cores, unless the user set OMP_NUM_THREADS."""
    if num_processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(threads_per_process(num_processes))
        torch.set_num_threads(threads_per_process(num_processes))
