"""What an environment is."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping

from treadle_fabric.errors import MisconfigurationException

__all__ = ["ClusterEnvironment", "StartedEnvironment", "require_number", "require_variable"]


class ClusterEnvironment(ABC):
    """Where a process learns its rank, and where the ranks meet.

    One subclass for each way to start processes. To write one, implement everything that is abstract here.
    """

    environ: Mapping[str, str] | None = None
    """The environment variables to go by; this process's own by default."""

    @property
    def variables(self) -> Mapping[str, str]:
        """The environment variables to go by."""
        return os.environ if self.environ is None else self.environ

    @property
    @abstractmethod
    def creates_processes_externally(self) -> bool:
        """Whether the processes are there already, so that nothing has to be launched."""

    @property
    @abstractmethod
    def main_address(self) -> str:
        """Host name or address of rank 0."""

    @property
    @abstractmethod
    def main_port(self) -> int:
        """A port on that host that all ranks know and nobody uses."""

    @staticmethod
    @abstractmethod
    def detect() -> bool:
        """Whether the current process runs in this environment."""

    @abstractmethod
    def world_size(self) -> int:
        """Number of processes on all machines."""

    @abstractmethod
    def set_world_size(self, size: int) -> None:
        """Told by the strategy; ignored where the environment knows it."""

    @abstractmethod
    def global_rank(self) -> int:
        """This process among all, from 0."""

    @abstractmethod
    def set_global_rank(self, rank: int) -> None:
        """Told by the strategy; ignored where the environment knows it."""

    @abstractmethod
    def local_rank(self) -> int:
        """This process among those on its machine, from 0."""

    @abstractmethod
    def node_rank(self) -> int:
        """This machine among all, from 0."""

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Compare what the user asked for with what was started.

        Nothing, unless a subclass knows better.

        Args:
            num_devices: Processes on each machine.
            num_nodes: Machines.

        Raises:
            MisconfigurationException: if they differ.
        """

    def processes_per_node(self) -> int | None:
        """Processes on this machine, where the environment says; None, unless a subclass knows."""
        return None

    def started_processes(self) -> int:
        """The processes that a cluster manager started, on all machines; 1 where Treadle or the user starts them."""
        return 1

    def announcing_signal(self) -> int:
        """The number of the signal with which the cluster announces the end of the job; 0: none."""
        return 0

    def teardown(self) -> None:
        """Undo what the environment changed. Nothing, unless a subclass changes something."""


class StartedEnvironment(ClusterEnvironment):
    """Processes that somebody else has started, and that find their ranks in what was set for them."""

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
        """Compare the number of processes that the user asked for with those that ``who`` started.

        Raises:
            MisconfigurationException: if they differ, with the remedy.
        """
        if num_devices * num_nodes != self.world_size():
            raise MisconfigurationException(
                f"devices={num_devices} and num_nodes={num_nodes} ask for {num_devices * num_nodes} processes, but "
                f"{who} started {self.world_size()}. {remedy}"
            )


def require_variable(name: str, environ: Mapping[str, str]) -> str:
    """The value of an environment variable that the environment must have set.

    Raises:
        MisconfigurationException: if it is not set.
    """
    value = environ.get(name)
    if value is None:
        raise MisconfigurationException(
            f"The environment variable {name} is not set, which whoever starts the processes has to do. Set it, or "
            "choose another environment: Fabric(plugins=LightningEnvironment())."
        )
    return value


def require_number(name: str, environ: Mapping[str, str], default: int | None = None) -> int:
    """The value of an environment variable that holds a rank, a count or a port.

    Args:
        name: Of the variable.
        environ: The environment variables to go by.
        default: Taken where the variable is not set; None: it must be.

    Raises:
        MisconfigurationException: if it is no whole number, or not set and without a default.
    """
    if default is not None and name not in environ:
        return default
    value = require_variable(name, environ)
    try:
        return int(value)
    except ValueError:
        raise MisconfigurationException(
            f"{name}={value!r} is no whole number. Whoever starts the processes has to set it to one."
        ) from None
