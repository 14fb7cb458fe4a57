"""One or several machines without a cluster manager."""

from __future__ import annotations

import random
import socket
from collections.abc import Mapping

from treadle_fabric.environments.environment import ClusterEnvironment, require_number
from treadle_fabric.errors import MisconfigurationException

__all__ = ["LightningEnvironment", "find_free_port"]


class LightningEnvironment(ClusterEnvironment):
    """Processes that Treadle starts itself, or that the user starts with LOCAL_RANK set for each.

    On one machine nothing needs to be set. On several, the user starts the script once on each machine: MASTER_ADDR
    and MASTER_PORT name the first machine, and NODE_RANK numbers the machines from 0.
    """

    def __init__(self) -> None:
        self._port: int | None = None
        self._world_size: int | None = None
        self._global_rank: int | None = None

    @property
    def creates_processes_externally(self) -> bool:
        return "LOCAL_RANK" in self.variables

    @property
    def main_address(self) -> str:
        return self.variables.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        if "MASTER_PORT" in self.variables:
            return require_number("MASTER_PORT", self.variables)
        if self._port is None:
            self._port = find_free_port()
        return self._port

    @staticmethod
    def detect(environ: Mapping[str, str] | None = None) -> bool:
        return True

    def world_size(self) -> int:
        if self._world_size is not None:
            return self._world_size
        return require_number("WORLD_SIZE", self.variables, default=1)

    def set_world_size(self, size: int) -> None:
        self._world_size = size

    def global_rank(self) -> int:
        # A launched process trusts its environment variables first: a rank that was set may be another process's.
        if "LOCAL_WORLD_SIZE" in self.variables and "LOCAL_RANK" in self.variables:
            return self.node_rank() * require_number("LOCAL_WORLD_SIZE", self.variables) + self.local_rank()
        if self._global_rank is not None:
            return self._global_rank
        return self.local_rank()

    def set_global_rank(self, rank: int) -> None:
        self._global_rank = rank

    def local_rank(self) -> int:
        return require_number("LOCAL_RANK", self.variables, default=0)

    def node_rank(self) -> int:
        return require_number("NODE_RANK" if "NODE_RANK" in self.variables else "GROUP_RANK", self.variables, default=0)

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        if self.creates_processes_externally:
            started = require_number("LOCAL_WORLD_SIZE", self.variables, default=num_devices)
            if num_devices not in (1, started):
                raise MisconfigurationException(
                    f"devices={num_devices}, but this script runs in {started} processes on this machine. Use the "
                    "same number of devices throughout a script."
                )
        elif num_nodes > 1:
            missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in self.variables]
            if missing:
                raise MisconfigurationException(
                    f"num_nodes={num_nodes}, but {', '.join(missing)} not set. Start the script on each machine with "
                    "MASTER_ADDR and MASTER_PORT naming the first one and NODE_RANK=0, 1, ..., or use torchrun."
                )


def find_free_port() -> int:
    """Find a TCP port on which no process listens at the moment."""
    # Below the range that systems assign to outgoing connections: such a port may be taken before rank 0 listens.
    candidates = [random.SystemRandom().randrange(15000, 32768) for _ in range(100)]
    for port in (*candidates, 0):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            try:
                listener.bind(("", port))
            except OSError:
                continue
            return int(listener.getsockname()[1])
    raise OSError("no TCP port is free")
