"""Processes started by mpirun."""

from __future__ import annotations

import os
import socket
import zlib
from collections.abc import Mapping
from functools import cached_property
from importlib.util import find_spec
from typing import Any, cast

from treadle_fabric.environments.environment import StartedEnvironment, require_number
from treadle_fabric.environments.local import find_free_port
from treadle_fabric.errors import MisconfigurationException

__all__ = ["MPIEnvironment"]

# The variables that MPI launchers set: Open MPI, then MPICH and Intel MPI, then MVAPICH.
_SIZE = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_RANK = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
_LOCAL_SIZE = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE")
_LOCAL_RANK = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "MV2_COMM_WORLD_LOCAL_RANK")
_JOB = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_KVSNAME")


class MPIEnvironment(StartedEnvironment):
    """Processes started by ``mpirun`` or ``mpiexec``.

    Ranks come from the variables that the MPI launcher sets. On several machines, mpi4py is asked for what these
    variables do not tell.
    """

    def __init__(self) -> None:
        self._port: int | None = None

    @property
    def main_address(self) -> str:
        if "MASTER_ADDR" in self.variables:
            return self.variables["MASTER_ADDR"]
        if self._is_on_one_node():
            return "127.0.0.1"
        return cast(str, self._world.bcast(socket.gethostname(), root=0))

    @property
    def main_port(self) -> int:
        if "MASTER_PORT" in self.variables:
            return require_number("MASTER_PORT", self.variables)
        job = _first(_JOB, self.variables)
        if self._is_on_one_node() and job is not None:
            return 12000 + zlib.crc32(self.variables[job].encode()) % 16000  # all ranks know the job's name
        if self._port is None:
            self._port = cast(int, self._world.bcast(find_free_port(), root=0))
        return self._port

    @staticmethod
    def detect(environ: Mapping[str, str] | None = None) -> bool:
        size = _number(_SIZE, os.environ if environ is None else environ)
        return size is not None and size > 1

    def world_size(self) -> int:
        size = _number(_SIZE, self.variables)
        return size if size is not None else cast(int, self._world.Get_size())

    def global_rank(self) -> int:
        rank = _number(_RANK, self.variables)
        return rank if rank is not None else cast(int, self._world.Get_rank())

    def local_rank(self) -> int:
        rank = _number(_LOCAL_RANK, self.variables)
        return rank if rank is not None else self._places[self.global_rank()][1]

    def node_rank(self) -> int:
        return 0 if self._is_on_one_node() else self._places[self.global_rank()][0]

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        remedy = "Make the numbers equal; devices='auto' takes the number of processes on a machine."
        self.check_count(num_devices, num_nodes, "MPI", remedy)

    def processes_per_node(self) -> int | None:
        return _number(_LOCAL_SIZE, self.variables)

    def _is_on_one_node(self) -> bool:
        return self.processes_per_node() == self.world_size()

    @cached_property
    def _world(self) -> Any:
        if find_spec("mpi4py") is None:
            raise MisconfigurationException(
                "The variables of this MPI launcher do not tell every rank, address and port, and mpi4py, which does, "
                "is not installed. Install mpi4py, or set MASTER_ADDR and MASTER_PORT for all processes (mpirun -x "
                "MASTER_ADDR ...)."
            )
        from mpi4py import MPI  # starts MPI

        return MPI.COMM_WORLD

    @cached_property
    def _places(self) -> list[tuple[int, int]]:
        """The node rank and the local rank of each global rank."""
        hosts = self._world.allgather(socket.gethostname())
        nodes = list(dict.fromkeys(hosts))
        return [(nodes.index(host), hosts[:rank].count(host)) for rank, host in enumerate(hosts)]


def _first(names: tuple[str, ...], environ: Mapping[str, str]) -> str | None:
    """Return the first of the names that is set; None if none is."""
    return next((name for name in names if name in environ), None)


def _number(names: tuple[str, ...], environ: Mapping[str, str]) -> int | None:
    name = _first(names, environ)
    return None if name is None else require_number(name, environ)
