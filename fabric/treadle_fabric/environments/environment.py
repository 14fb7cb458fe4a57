"""The base classes of cluster environments, and how they read environment variables."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from treadle_fabric.errors import MisconfigurationException

__all__ = [
    "ClusterEnvironment",
    "Finding",
    "StartedEnvironment",
    "list_variables",
    "pick",
    "refuse_ranks_beyond",
    "require_number",
    "require_port",
    "require_variable",
]


class Finding(NamedTuple):
    """Whether the environment variables of a process describe one kind of environment, and why."""

    applies: bool
    """Whether a program of this kind started the process as one of its ranks."""
    variables: dict[str, str]
    """The environment variables by which this was decided, with their values."""
    reason: str
    """A sentence for the user."""
    note: str = ""
    """What to tell the user of a run in which these variables are not followed; empty where nothing is surprising."""
    warning: str = ""
    """What is probably a mistake in how the processes were started; empty where nothing is."""


class ClusterEnvironment(ABC):
    """The base class of environments, which tell a process its rank and where the ranks meet.

    There is one subclass for each way to start processes. To write a new one, implement every abstract method.
    """

    collects_output = False
    """Whether what the processes of all machines print comes together in one place, as that of a job of srun's does."""
    environ: Mapping[str, str] | None = None
    """The environment variables to read. Default: those of this process."""
    ends_processes: bool = False
    """Whether what started the processes hears of an exception in each, and ends all when one fails: then none ends
    itself because of another one."""

    @property
    def variables(self) -> Mapping[str, str]:
        """The environment variables that this object reads."""
        return os.environ if self.environ is None else self.environ

    @property
    @abstractmethod
    def creates_processes_externally(self) -> bool:
        """Whether something else has started the processes, so that nothing has to be launched."""

    @property
    @abstractmethod
    def main_address(self) -> str:
        """The host name or address of rank 0."""

    @property
    @abstractmethod
    def main_port(self) -> int:
        """A free port on the host of rank 0, the same on all ranks."""

    @staticmethod
    @abstractmethod
    def detect() -> bool:
        """Return whether the current process runs in this environment."""

    @abstractmethod
    def world_size(self) -> int:
        """Return the number of processes on all machines."""

    @abstractmethod
    def set_world_size(self, size: int) -> None:
        """Set the number of processes that the strategy counted; ignored where the environment knows the number."""

    @abstractmethod
    def global_rank(self) -> int:
        """Return this process's rank among all processes, from 0."""

    @abstractmethod
    def set_global_rank(self, rank: int) -> None:
        """Set the rank that the strategy computed; ignored where the environment knows the rank."""

    @abstractmethod
    def local_rank(self) -> int:
        """Return this process's rank among those on its machine, from 0."""

    @abstractmethod
    def node_rank(self) -> int:
        """Return this machine's rank among all machines, from 0."""

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Refuse numbers of devices and machines that differ from what was started; by default nothing is checked.

        Args:
            num_devices: Processes on each machine that the user asked for.
            num_nodes: Machines that the user asked for.

        Raises:
            MisconfigurationException: The numbers differ.
        """

    def processes_per_node(self) -> int | None:
        """Return the number of processes on this machine; None where the environment does not tell."""
        return None

    def started_nodes(self) -> int | None:
        """Return the number of machines on which processes were started; None where the user has to say it."""
        return None

    def assigned_device(self) -> torch.device | None:
        """Return the device that was given to this process; None where those of a machine go by local ranks."""
        return None

    def evidence(self) -> dict[str, str]:
        """Return the environment variables that ranks, counts and meeting point come from, with their values."""
        return {}

    def explain_ranks(self, world_size: int) -> str:
        """Say which variables say that there are so many processes, and what to do where these do not come.

        Args:
            world_size: The number of processes that this one waits for, itself included.

        Returns:
            Sentences for the messages of a process that waits; by default none.
        """
        return ""

    def describe(self) -> dict[str, str]:
        """Return what ``treadle-fabric environment`` prints of ranks and meeting point, where asking has a price.

        That is so where the methods would ask other processes, or take a port. By default nothing: the methods tell.

        Raises:
            MisconfigurationException: A variable is malformed.
        """
        return {}

    def started_processes(self) -> int:
        """Return the number of processes that a cluster manager started, on all machines; 1 without such a manager."""
        return 1

    def announcing_signal(self) -> int:
        """Return the number of the signal with which the cluster announces the end of the job; 0 for none."""
        return 0

    def job_to_requeue(self) -> str:
        """Return the cluster's name of the job, to be queued again after that signal; empty where this is not wanted.

        :func:`treadle_fabric.environments.requeue` takes the name.
        """
        return ""

    def teardown(self) -> None:
        """Undo what the environment changed; by default nothing."""


class StartedEnvironment(ClusterEnvironment):
    """The base class of environments in which another program starts the processes and tells them their ranks."""

    @staticmethod
    @abstractmethod
    def examine(environ: Mapping[str, str] | None = None) -> Finding:
        """Return whether this program started the process, and by which variables that was decided.

        Args:
            environ: The environment variables to decide by. Default: those of this process.
        """

    @classmethod
    def detect(cls, environ: Mapping[str, str] | None = None) -> bool:
        return cls.examine(environ).applies

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def started_processes(self) -> int:
        return self.world_size()

    def set_world_size(self, size: int) -> None:
        pass

    def set_global_rank(self, rank: int) -> None:
        pass

    def check_count(self, num_devices: int, num_nodes: int, who: str, remedy: str) -> None:
        """Refuse numbers of processes, in all and on this machine, that differ from those that ``who`` started.

        Args:
            num_devices: Processes on each machine that the user asked for.
            num_nodes: Machines that the user asked for.
            who: The program that started the processes, for the error.
            remedy: What to do, for the error.

        Raises:
            MisconfigurationException: The numbers differ.
        """
        if num_devices * num_nodes != self.world_size():
            raise MisconfigurationException(
                f"devices={num_devices} and num_nodes={num_nodes} ask for {num_devices * num_nodes} processes, but "
                f"{who} started {self.world_size()}. {remedy}"
            )
        here = self.processes_per_node()
        if here is not None and here != num_devices:
            raise MisconfigurationException(
                f"devices={num_devices}, but {who} started {here} processes on this machine, and each machine needs "
                f"the same number. {remedy}"
            )


def pick(names: Iterable[str], environ: Mapping[str, str]) -> dict[str, str]:
    """Return those of the environment variables that are set, with their values, in the order of the names."""
    return {name: environ[name] for name in names if name in environ}


def list_variables(variables: Mapping[str, str]) -> str:
    """Return variables and values for a sentence: ``RANK=0, WORLD_SIZE=2``."""
    return ", ".join(f"{name}={value}" for name, value in variables.items())


def require_variable(name: str, environ: Mapping[str, str]) -> str:
    """Return the value of an environment variable that must be set.

    Raises:
        MisconfigurationException: The variable is not set, or empty.
    """
    value = environ.get(name)
    if not value or not value.strip():
        raise MisconfigurationException(
            f"The environment variable {name} is {'not set' if value is None else 'empty'}; the program that starts "
            "the processes has to set it. Set it, or choose another environment: "
            "Fabric(plugins=LightningEnvironment())."
        )
    return value


def require_number(
    name: str, environ: Mapping[str, str], default: int | None = None, *, minimum: int = 0, maximum: int | None = None
) -> int:
    """Return the value of an environment variable that holds a rank, a count or a port.

    Args:
        name: The variable's name.
        environ: The environment variables to read.
        default: The result where the variable is not set. Default: None, and the variable must be set.
        minimum: The smallest value: 0 for a rank, 1 for a count.
        maximum: The largest value. Default: there is none.

    Raises:
        MisconfigurationException: The value is no whole number, or out of range, or the variable is not set and there
            is no default.
    """
    if default is not None and name not in environ:
        return default
    value = environ[name] if name in environ else require_variable(name, environ)
    try:
        number = int(value)
    except ValueError:
        raise MisconfigurationException(
            f"{name}={value!r} is no whole number. The program that starts the processes has to set it to one."
        ) from None
    if number < minimum or (maximum is not None and number > maximum):
        span = f"{minimum} or more" if maximum is None else f"from {minimum} to {maximum}"
        raise MisconfigurationException(
            f"{name}={value!r}, and this number has to be {span}. Correct it where the processes are started, or "
            f"`unset {name}` if it is left over."
        )
    return number


def require_port(environ: Mapping[str, str]) -> int:
    """Return MASTER_PORT, a TCP port; 0, for any free one, does where WORLD_SIZE says that nobody else has to find it.

    Raises:
        MisconfigurationException: It is not set, or no port.
    """
    alone = environ.get("WORLD_SIZE", "").strip() == "1"
    return require_number("MASTER_PORT", environ, minimum=0 if alone else 1, maximum=65535)


def refuse_ranks_beyond(pairs: Iterable[tuple[str, str]], environ: Mapping[str, str], who: str) -> None:
    """Refuse a rank that is not below the number of what it counts, where both variables are set.

    Args:
        pairs: Names of variables: of a rank, and of the number of processes or machines that are ranked.
        environ: The environment variables to read.
        who: The program that sets the variables, for the error.

    Raises:
        MisconfigurationException: A rank is too large, or a value is malformed.
    """
    for rank, count in pairs:
        if rank in environ and count in environ:
            value, size = require_number(rank, environ), require_number(count, environ, minimum=1)
            if value >= size:
                raise MisconfigurationException(
                    f"{rank}={value}, but {count}={size}: ranks go from 0 to {size - 1}. {who} sets both; one of them "
                    f"is left over or was set by hand. Correct it, or `unset {rank} {count}`."
                )
