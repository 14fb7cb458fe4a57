"""One or several machines without a cluster manager."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Mapping

from treadle_fabric.environments.environment import (
    ClusterEnvironment,
    Finding,
    list_variables,
    pick,
    require_number,
    require_port,
    require_variable,
)
from treadle_fabric.environments.slurm_job import job_to_requeue, signal_of_job
from treadle_fabric.errors import MisconfigurationException

__all__ = ["LightningEnvironment", "find_free_port"]

_READ = (
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "WORLD_SIZE",
    "NODE_RANK",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TREADLE_LAUNCH_DIR",
)


class LightningEnvironment(ClusterEnvironment):
    """Processes that Treadle starts itself, or that the user starts with LOCAL_RANK set for each.

    On one machine nothing needs to be set. On several, the user starts the script once on each machine: MASTER_ADDR
    and MASTER_PORT name the first machine, and NODE_RANK numbers the machines from 0.
    """

    def __init__(self) -> None:
        self._port: int | None = None
        self._world_size: int | None = None
        self._global_rank: int | None = None
        self._per_node: int | None = None

    @property
    def creates_processes_externally(self) -> bool:
        return "LOCAL_RANK" in self.variables

    @property
    def main_address(self) -> str:
        return require_variable("MASTER_ADDR", self.variables) if "MASTER_ADDR" in self.variables else "127.0.0.1"

    @property
    def main_port(self) -> int:
        if "MASTER_PORT" in self.variables:
            return require_port(self.variables)
        if self._port is None:
            self._port = find_free_port()
        return self._port

    @staticmethod
    def detect(environ: Mapping[str, str] | None = None) -> bool:
        return True

    @staticmethod
    def examine(environ: Mapping[str, str] | None = None) -> Finding:
        """Return that this environment fits where no other does, and which of its variables are set."""
        found = pick(_READ, os.environ if environ is None else environ)
        if "LOCAL_RANK" in found:
            return Finding(True, found, f"LOCAL_RANK={found['LOCAL_RANK']} says that the processes are there already.")
        return Finding(True, found, "LOCAL_RANK is not set: Treadle starts the processes.")

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
        return self.node_rank() * (self._per_node or 0) + self.local_rank()

    def set_global_rank(self, rank: int) -> None:
        self._global_rank = rank

    def local_rank(self) -> int:
        return require_number("LOCAL_RANK", self.variables, default=0)

    def node_rank(self) -> int:
        return require_number("NODE_RANK" if "NODE_RANK" in self.variables else "GROUP_RANK", self.variables, default=0)

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        if self.creates_processes_externally:
            self._check_started(num_devices, num_nodes)
        elif num_nodes > 1:
            missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in self.variables]
            if missing:
                srun = (
                    "In a SLURM job, start the script with `srun python ...`. "
                    if "SLURM_JOB_ID" in self.variables
                    else ""
                )
                raise MisconfigurationException(
                    f"num_nodes={num_nodes}, but {', '.join(missing)} not set. {srun}Start the script on each machine "
                    "with MASTER_ADDR and MASTER_PORT naming the first one and NODE_RANK=0, 1, ..., or use torchrun."
                )
        if "TREADLE_LAUNCH_DIR" not in self.variables and (num_nodes > 1 or self.creates_processes_externally):
            self._check_places(num_devices, num_nodes)

    def _check_places(self, num_devices: int, num_nodes: int) -> None:
        """Refuse the number of a machine, and a WORLD_SIZE, that the arguments contradict."""
        if "MASTER_PORT" in self.variables:
            require_port(self.variables)
        name = "NODE_RANK" if "NODE_RANK" in self.variables else "GROUP_RANK"
        if self.node_rank() >= num_nodes:
            raise MisconfigurationException(
                f"{name}={self.node_rank()}, but num_nodes={num_nodes}: the machines are numbered from 0 to "
                f"{num_nodes - 1}. Pass num_nodes, or, if {name} is left over, `unset {name}`."
            )
        size = require_number("WORLD_SIZE", self.variables, default=num_nodes, minimum=1)
        if size not in (num_nodes, num_devices * num_nodes):  # some set it to the number of machines
            raise MisconfigurationException(
                f"WORLD_SIZE={size}, but devices={num_devices} and num_nodes={num_nodes} ask for "
                f"{num_devices * num_nodes} processes. Make them equal, or, if WORLD_SIZE is left over, `unset "
                "WORLD_SIZE`: Treadle computes it."
            )

    def _check_started(self, num_devices: int, num_nodes: int) -> None:
        """Refuse numbers that cannot be those of the processes that LOCAL_RANK says are there."""
        local_rank = self.local_rank()
        started = require_number("LOCAL_WORLD_SIZE", self.variables, default=num_devices)
        if num_devices not in (1, started):
            raise MisconfigurationException(
                f"devices={num_devices}, but this script runs in {started} processes on this machine. Use the "
                "same number of devices throughout a script."
            )
        if not 0 <= local_rank < num_devices:
            raise MisconfigurationException(
                f"LOCAL_RANK={local_rank}, but devices={num_devices} asks for {num_devices} on each machine, which "
                f"are numbered from 0. Start so many, or, if LOCAL_RANK is left over, `unset LOCAL_RANK`."
            )
        reads_port = type(self).main_port is LightningEnvironment.main_port  # a subclass may know it otherwise
        told = {"MASTER_PORT", "LOCAL_WORLD_SIZE"} & set(self.variables)
        if num_devices * num_nodes > 1 and reads_port and not told:
            raise MisconfigurationException(
                f"LOCAL_RANK={local_rank} says that this is one of {num_devices * num_nodes} processes that another "
                "program started, but MASTER_PORT is not set, by which they find one another. If LOCAL_RANK is left "
                "over, `unset LOCAL_RANK`, and Treadle starts the processes. If they were started by hand, set "
                "MASTER_ADDR and MASTER_PORT for all of them, to the same values."
            )
        self._per_node = num_devices
        self._check_rank(num_devices, num_nodes)

    def _check_rank(self, num_devices: int, num_nodes: int) -> None:
        """Refuse a RANK, as scripts with torch's ``env://`` have it, that is not the rank which this one computes."""
        if num_devices * num_nodes == 1 or "RANK" not in self.variables or "TREADLE_LAUNCH_DIR" in self.variables:
            return
        rank = self.global_rank()  # of a program's own, perhaps, which knows it from elsewhere
        if require_number("RANK", self.variables) != rank:
            which = "NODE_RANK" if "NODE_RANK" in self.variables else "GROUP_RANK"
            node = f"{which}={self.node_rank()}" if which in self.variables else "NODE_RANK is not set, so"
            raise MisconfigurationException(
                f"RANK={self.variables['RANK']}, but {node} node {self.node_rank()} with devices={num_devices} and "
                f"LOCAL_RANK={self.local_rank()} is rank {rank}. Set NODE_RANK to the number of the machine, from 0, "
                "or, if RANK is left over, `unset RANK`."
            )

    def announcing_signal(self) -> int:
        """Return SIGUSR1 in a SLURM job, where ``#SBATCH --signal=B:SIGUSR1@90`` sends it to the batch script; else 0.

        A process that does not take the signal dies of it.
        """
        return signal_of_job(self.variables)

    def job_to_requeue(self) -> str:
        return job_to_requeue(self.variables)

    def evidence(self) -> dict[str, str]:
        return pick(_READ, self.variables)

    def explain_ranks(self, world_size: int) -> str:
        if not self.creates_processes_externally:
            on_each = list_variables(pick(("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"), self.variables))
            return (
                f"devices and num_nodes ask for {world_size} processes ({on_each}). Start the script on each machine."
            )
        said = list_variables(pick(("LOCAL_RANK", "MASTER_PORT", "NODE_RANK"), self.variables))
        if self._port is not None or "TREADLE_LAUNCH_DIR" in self.variables:
            return (
                f"Treadle started {self.variables.get('LOCAL_WORLD_SIZE', world_size)} of the {world_size} processes "
                "on this machine. Each comes here when its script has got to the launch: imports take time, more on a "
                "busy machine. The run goes on when all are here."
            )
        return (
            f"{said} say that the processes are there already, and devices and num_nodes that there are {world_size}. "
            "If LOCAL_RANK is left over from another program, `unset LOCAL_RANK`, and Treadle starts the processes. "
            "If they are started by hand, start all of them."
        )

    def describe(self) -> dict[str, str]:
        described = {"local rank": str(self.local_rank()), "node rank": str(self.node_rank())}
        if "LOCAL_WORLD_SIZE" in self.variables and "LOCAL_RANK" in self.variables:
            described = {"global rank": f"{self.global_rank()} of {self.world_size()}", **described}
        chosen = ", at a free port that is chosen when the processes are started"
        port = f":{self.main_port}" if "MASTER_PORT" in self.variables else chosen
        return {**described, "meeting point": f"{self.main_address}{port}"}


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
