"""What a launcher is, and what launchers tell the processes that they start."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from treadle_fabric.environments.environment import ClusterEnvironment

__all__ = ["LAUNCH_DIR_VARIABLE", "Launcher", "limit_threads", "put_variables", "rank_variables", "threads_per_process"]

LAUNCH_DIR_VARIABLE = "TREADLE_LAUNCH_DIR"

T = TypeVar("T")


class Launcher(ABC):
    """Runs a function in every process of a run."""

    @property
    @abstractmethod
    def is_interactive_compatible(self) -> bool:
        """Whether the launcher works in a notebook or a Python prompt."""

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
    return max(1, usable_cores() // max(1, num_processes))


def usable_cores() -> int:
    """The number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def limit_threads(num_processes: int) -> None:
    """Keep processes from competing for cores, unless the user set OMP_NUM_THREADS."""
    if num_processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(threads_per_process(num_processes))
        torch.set_num_threads(threads_per_process(num_processes))


def rank_variables(environment: ClusterEnvironment, num_processes: int, num_nodes: int = 1) -> dict[str, str]:
    """The environment variables by which started processes find one another; LOCAL_RANK is each one's own."""
    return {
        "MASTER_ADDR": environment.main_address,
        "MASTER_PORT": str(environment.main_port),
        "NODE_RANK": str(environment.node_rank()),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "WORLD_SIZE": str(num_processes * num_nodes),
        "TORCHELASTIC_USE_AGENT_STORE": "False",  # which may be left over from torchrun, and nobody else has the store
    }


def put_variables(variables: Mapping[str, str | None]) -> dict[str, str | None]:
    """Set environment variables, or remove those that are None; returns what to put for how they were before."""
    before = {name: os.environ.get(name) for name in variables}
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    return before
